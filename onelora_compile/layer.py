"""The adapted form of a linear module: the same object, of a subclass of its own class.

Why a subclass and not a forward hook: Dynamo does not guard on hooks (`skip_nnmodule_hook_guards`), but on
types.  With hooks, measured on torch 2.13, a frozen model that was compiled before it was adapted, or beside an
unadapted copy of itself, ran the base's graph without a word.  With the subclass each finds its own graph.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from onelora_compile.ops import RANK1_UPDATE

VECTOR = "onelora_vector"  # the parameter's name on the module, and so the ending of its key in state_dict


class OneLoRALayer:
    """Mixed in before the module's own class by `adapted_class`; never instantiated alone."""

    onelora_vector: nn.Parameter  # [out_features]
    _onelora_base: type[nn.Module]
    _onelora_input: str  # name of the first argument of the base's forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's forward, then the rank-1 update of its output by its input."""
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{type(self).__name__} returned {type(y).__name__}; a linear that returns more than one tensor "
                "can't be adapted: leave it out with exclude_modules"
            )
        x = args[0] if args else kwargs[self._onelora_input]
        return RANK1_UPDATE(y, x, self.onelora_vector)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the base class: the subclass is made at run time and can't be imported by name."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        if args[:1] == (type(self),):
            return (_new_adapted, (function, self._onelora_base, args[1:]), *rest)
        return (function, args, *rest)


def _new_adapted(function: Any, base: Any, args: tuple[Any, ...]) -> nn.Module:
    return function(adapted_class(base), *args)


@functools.cache
def adapted_class(base: Any) -> Any:
    """The adapted subclass of a linear class, `OneLoRA` + its name; one per class, so that guards agree."""
    names = [name for name in inspect.signature(base.forward).parameters if name != "self"]
    return type(
        f"OneLoRA{base.__name__}",
        (OneLoRALayer, base),
        {"__module__": __name__, "__doc__": base.__doc__, "_onelora_base": base, "_onelora_input": names[0]},
    )


def is_adapted(module: object) -> bool:
    """Whether the module itself carries a vector."""
    return isinstance(module, OneLoRALayer)


def vector_of(module: nn.Module) -> nn.Parameter:
    """The vector of an adapted module."""
    vector = module._parameters[VECTOR]
    assert isinstance(vector, nn.Parameter)
    return vector


def attach(module: nn.Module, vector: Tensor) -> None:
    """Give the module its vector [out_features] and make it an adapted one."""
    base: Any = type(module)
    module.register_parameter(VECTOR, nn.Parameter(vector))
    module.__class__ = adapted_class(base)


def remove(module: nn.Module) -> None:
    """Undo `attach`: the vector is dropped, the class is the base's again."""
    del module._parameters[VECTOR]
    module.__class__ = module._onelora_base  # type: ignore[assignment]


def weight_view(module: nn.Module) -> Tensor:
    """The weight as [out_features, in_features]: a view that shares memory, transposed for Conv1D."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_conv1d(module) else weight.detach()


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear that stores its weight as [in_features, out_features]."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an ordinary linear: `nn.Linear`, a subclass of it, or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def out_features(module: nn.Module) -> int:
    """Rows of W."""
    size = module.nf if is_conv1d(module) else module.out_features
    assert isinstance(size, int)
    return size


def in_features(module: nn.Module) -> int:
    """Columns of W."""
    size = module.nx if is_conv1d(module) else module.in_features
    assert isinstance(size, int)
    return size
