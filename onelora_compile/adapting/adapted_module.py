"""The adapted form of a module: the same object, of a subclass of its own class.

Two forms: a module that is called adds the update to its output (`OneLoRALayer`); a module whose weights are read
hands out W + vector 1ᵀ instead of W (`OneLoRAWeights`), while `_parameters`, and so `state_dict`, keep W.

Why a subclass and not a forward hook or `torch.nn.utils.parametrize`: Dynamo does not guard on hooks
(`skip_nnmodule_hook_guards`), but on types.  With hooks, measured on torch 2.13, a frozen model that was compiled
before it was adapted, or beside an unadapted copy of itself, ran the base's graph without a word.  With the subclass
each finds its own graph.  `parametrize` renames and reorders the keys of `state_dict`, and removing it from a deepcopy
breaks the class of the original.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.adapting import eager_linear
from onelora_compile.adapting.batch_rows import ROWS, chosen_rows, vector_of_rows
from onelora_compile.adapting.dead_vectors import observe
from onelora_compile.adapting.dispatched import hide_from_hook, rebind, show_to_hook
from onelora_compile.adapting.recomputed import refuse_other_values
from onelora_compile.errors import StateError
from onelora_compile.looking.unannounced import subclass
from onelora_compile.ops import ADAPTED_WEIGHT, RANK1_UPDATE
from onelora_compile.sharded import is_fsdp_shard

_FUSION = "torch.nn.utils.fusion"
VECTOR_NAME = "onelora_vector"  # the parameter's name on the module, and so the ending of its key in state_dict


def vector_name(parameter: str) -> str:
    """Under which name the module keeps the vector of its parameter `parameter`."""
    return VECTOR_NAME if parameter == "weight" else f"{VECTOR_NAME}_{parameter}"


def is_vector(name: str) -> bool:
    """Whether a parameter of that name is a vector."""
    return name.startswith(VECTOR_NAME)


class Adapted(nn.Module):
    """What both forms share; mixed in before the module's own class, never instantiated alone."""

    _onelora_base: type[nn.Module]
    # The names of the weights that have a vector, each with its input axes, as in `Target.dims`.
    _onelora_weights: Mapping[str, tuple[int, ...] | None]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Vectors that leave the meta device are zeros: `to_empty` would leave memory as it was."""
        own = ((name, self._parameters.get(name)) for name in map(vector_name, self._onelora_weights))
        names = [name for name, vector in own if vector is not None and vector.is_meta]
        result = super()._apply(fn, recurse)
        with torch.no_grad():
            for name in names:
                self._parameters[name].zero_()  # type: ignore[union-attr]
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """A checkpoint of the base, assigned to a model on the meta device, has no vectors: they are zeros then."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        for parameter in self._onelora_weights:
            name = vector_name(parameter)
            vector, weight = self._parameters.get(name), self._parameters.get(parameter)
            if vector is not None and weight is not None and vector.is_meta and not weight.is_meta:
                zeros = torch.zeros(vector.shape, dtype=vector.dtype, device=weight.device)
                self._parameters[name] = nn.Parameter(zeros, vector.requires_grad)

    def __prepare_scriptable__(self) -> nn.Module:
        """Asked by `torch.jit.script`, whose own words would be of a type annotation."""
        raise StateError(
            f"torch.jit.script can't compile the forward of an adapted module ({type(self).__name__}): "
            "call onelora.merge on a copy of the model and script that, or take torch.jit.trace"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the base class: the subclass is made at run time and can't be imported by name.

        Raises:
            StateError: the copy is one into which PyTorch fuses a norm. It writes to the weight and the bias of the
                copy, and leaves the vector as it was for the weight before: another function, without a word.
        """
        caller = sys._getframe().f_back  # copy.deepcopy
        if caller and caller.f_back and caller.f_back.f_globals.get("__name__") == _FUSION:
            raise StateError(
                f"{_FUSION} can't fuse a norm into an adapted module ({type(self).__name__}), as it knows no vector: "
                "fuse before onelora.adapt, or after onelora.merge"
            )
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        if rest and isinstance(rest[0], dict):  # its part of the model's tables is made anew by the next block
            rest[0] = {key: value for key, value in rest[0].items() if key != ROWS}
        if args[:1] == (type(self),):
            own = (isinstance(self, OneLoRALayer), tuple(self._onelora_weights.items()))
            return (_new_adapted, (function, self._onelora_base, args[1:], *own), *rest)
        return (function, args, *rest)


class OneLoRALayer(Adapted):
    """A linear that is called: the update by its input is added to its output."""

    onelora_vector: nn.Parameter  # [out_features]
    _onelora_input: str  # name of the first argument of the base's forward
    _onelora_own_forward: bool  # whether the base's forward is code that nobody knows

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's forward, then the rank-1 update of its output by its input."""
        if not is_adapted(self):  # a tool holds this method, bound, from before the vector was taken off
            return type(self).forward(self, *args, **kwargs)
        refuse_other_values(self)
        chosen = chosen_rows(self)
        if eager_linear.takes(self, args, kwargs, self.onelora_vector):
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            if chosen is None:
                observe(self, args[0])
                return eager_linear.adapted_linear(args[0], weight, bias, self.onelora_vector)  # type: ignore[arg-type]
            if not torch.is_grad_enabled():
                y = nn.functional.linear(args[0], weight, bias)  # type: ignore[arg-type]
                vector = vector_of_rows(self, self.onelora_vector, y, chosen)
                return eager_linear.add_in_place(y, args[0], vector)
        y = super().forward(*args, **kwargs)
        if not isinstance(y, (Tensor, torch.fx.Proxy)):
            raise TypeError(
                f"{type(self).__name__} returned {type(y).__name__}; a linear that returns more than one tensor "
                "can't be adapted: leave it out with exclude_modules"
            )
        x = args[0] if args else self._given(kwargs)
        if self._onelora_own_forward and isinstance(y, Tensor) and not y.is_nested:
            self._check(x, y)
        if isinstance(x, Tensor) and not torch.compiler.is_compiling():  # torch.fx traces with proxies
            observe(self, x)
        vector = self.onelora_vector if chosen is None else vector_of_rows(self, self.onelora_vector, y, chosen)
        return RANK1_UPDATE(y, x, vector)

    def _check(self, x: Tensor, y: Tensor) -> None:
        """Whether y can be W x + c, row by row: code that nobody knows may do anything to the axes."""
        axes = self._onelora_weights["weight"]
        columns = self._parameters["weight"].shape[axes[0]] if axes else x.shape[-1]  # type: ignore[union-attr]
        if y.shape[:-1] != x.shape[:-1] or x.shape[-1] != columns:
            raise TypeError(
                f"{type(self).__name__} returned {list(y.shape)} for {list(x.shape)}: a linear that is no map of the "
                "last axis can't be adapted by its output: leave it out with exclude_modules"
            )

    def _given(self, kwargs: dict[str, Any]) -> Any:
        """The input of a call without positional arguments; of a forward(*args, **kwargs) as its base names it."""
        for name in (self._onelora_input, "input", "x"):
            if name in kwargs:
                return kwargs[name]
        raise TypeError(
            f"{type(self).__name__} was called with {sorted(kwargs)}, and which of these is the input of the linear "
            "can't be told: give the input as the first positional argument"
        )


class OneLoRAWeights(Adapted):
    """A module whose weights are read: each listed one is handed out as W + vector 1ᵀ."""


def _new_adapted(function: Any, base: Any, args: tuple[Any, ...], called: bool, weights: Any) -> nn.Module:
    return function(_adapted_class(base, called, weights), *args)


@functools.cache  # one class for each base, so that guards and `type(a) is type(b)` agree
def _adapted_class(base: Any, called: bool, weights: tuple[tuple[str, tuple[int, ...] | None], ...]) -> Any:
    attributes = {"__module__": __name__, "__doc__": base.__doc__, "_onelora_base": base}
    attributes["_onelora_weights"] = dict(weights)
    if called:
        attributes["_onelora_input"] = list(inspect.signature(base.forward).parameters)[1]  # after self, by any name
        attributes["_onelora_own_forward"] = base.forward is not nn.Linear.forward
    else:
        attributes |= {name: property(_reader(name, dims or ()), _refuser(name)) for name, dims in weights}
    return subclass(f"OneLoRA{base.__name__}", (OneLoRALayer if called else OneLoRAWeights, base), attributes)


def _reader(parameter: str, dims: tuple[int, ...]) -> Any:
    vector, axes = vector_name(parameter), list(dims)

    def read(self: nn.Module) -> Any:
        if parameter not in self._parameters:
            raise StateError(
                f"{parameter!r} of {type(self).__name__} is gone, and its vector has nothing to be added to: "
                "parametrizations and their kin take a parameter away. Build the model again and do that before adapt"
            )
        weight = self._parameters[parameter]
        # FSDP looks its shards up by attribute, and would take W + vector 1ᵀ for W.
        if type(weight).__name__ == "DTensor" and is_fsdp_shard(self, parameter):
            return weight
        refuse_other_values(self)
        held = getattr(self, vector)  # not of _parameters, where torch.fx does not see it
        if isinstance(held, torch.fx.Proxy):
            raise StateError(
                f"torch.fx.symbolic_trace can't follow {type(self).__name__}, which reads its weight {parameter!r}: "
                "its sum with the vector would be a constant of the graph; take torch.export, or call onelora.merge on "
                "a copy of the model and trace that"
            )
        return ADAPTED_WEIGHT(weight, held, axes)

    return read


def _refuser(parameter: str) -> Any:
    def refuse(self: nn.Module, value: Any) -> None:  # an nn.Parameter takes its place past the property
        raise StateError(
            f"{parameter!r} of {type(self).__name__} is handed out as W + vector 1ᵀ, so that a plain tensor can't take "
            "its place: assign an nn.Parameter; if FullyShardedDataParallel does this, shard with "
            "torch.distributed.fsdp.fully_shard"
        )

    return refuse


def is_adapted(module: object) -> bool:
    """Whether the module itself carries a vector."""
    return isinstance(module, Adapted)


def made_by_attach(module: nn.Module) -> bool:
    """Whether an adapted module is of the very class that it was given, so that its base's can be put back."""
    return "_onelora_base" in vars(type(module))


def attach_vectors(
    module: nn.Module, called: bool, weights: Mapping[str, tuple[int, ...] | None], vectors: Mapping[str, Tensor]
) -> None:
    """Give a module its vectors and make it an adapted one.

    Args:
        module: changed in place.
        called: whether the update is added to its output; else its weights are handed out adapted.
        weights: input axes of each weight, by parameter name; only "weight" for a module that is called.
        vectors: for each weight, of the shape of its other axes.
    """
    base: Any = type(module)
    for parameter, vector in vectors.items():
        module.register_parameter(vector_name(parameter), nn.Parameter(vector))
    module.__class__ = _adapted_class(base, called, tuple(weights.items()))
    rebind(module, base, module.__class__)
    hide_from_hook(module, is_vector)


def detach_vectors(module: nn.Module) -> None:
    """Undo `attach_vectors`: the vectors are dropped, the class is the base's again."""
    assert isinstance(module, Adapted)
    for parameter in module._onelora_weights:
        del module._parameters[vector_name(parameter)]
    vars(module).pop(ROWS, None)
    adapted = type(module)
    module.__class__ = module._onelora_base  # type: ignore[assignment]
    rebind(module, adapted, module.__class__)
    show_to_hook(module)
