"""One weight that can carry a vector: which module holds it, how it is used, which of its axes are inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import VECTOR_NAME, Adapted, OneLoRALayer, attach_vectors, vector_name
from onelora_compile.adapting.dispatched import device_of_calls, value_of
from onelora_compile.adapting.module_names import clean_name
from onelora_compile.errors import StateError
from onelora_compile.kinds import is_plain
from onelora_compile.sharded import split_like_outputs, whole


@dataclasses.dataclass(frozen=True)
class Target:
    """A weight that is adapted, or can be.

    Attributes:
        module: the module that holds the weight.
        parameter: its name there.
        called: whether the module is called, so that the update is added to its output; else the weight is read by
            the module itself or by one around it, and is handed out as W + vector 1ᵀ.
        dims: input axes of the stored weight; empty where it is not stored as a plain tensor (quantised); None where
            the module computes something else than W x + c, so that its output is adapted and no weight can be.
        shape: of the vector: [out_features], [experts, out_features] for the weights of experts.
    """

    module: nn.Module
    parameter: str
    called: bool
    dims: tuple[int, ...] | None
    shape: tuple[int, ...]

    @property
    def vector(self) -> nn.Parameter:
        """The vector; only of an adapted module.

        Raises:
            StateError: something computes it from other parameters now.
        """
        return vector_at(self.module, vector_name(self.parameter))

    @property
    def weight(self) -> Tensor | None:
        """The base's weight as it is stored, without the vector; None where it is not a plain floating tensor."""
        weight = self.module._parameters.get(self.parameter)
        return weight if self.dims and weight is not None and is_plain(weight) else None

    @property
    def in_features(self) -> int:
        """Columns of W."""
        if self.called and self.weight is None:
            return _size(self.module, "in_features", "nx")
        assert self.weight is not None
        assert self.dims
        return prod(self.weight.shape[dim] for dim in self.dims)

    @property
    def out_features(self) -> int:
        """Rows of W, of all experts together."""
        return prod(self.shape)

    def key(self, module_name: str) -> str:
        """The name of the vector."""
        return vector_key(module_name, self.parameter)

    def blocks(self) -> Iterator[Tensor]:
        """The weight as matrices [out_features, in_features], one for each expert; views where that is possible."""
        assert self.weight is not None
        assert self.dims
        weight = value_of(self.module, self.parameter)
        rest = [axis for axis in range(weight.ndim) if axis not in self.dims]
        lined = whole(weight.detach()).permute(*rest, *self.dims)  # [*out, *in]
        if len(rest) == 1:
            yield lined.flatten(1)
        else:
            for expert in lined:
                yield expert.reshape(prod(expert.shape[: len(rest) - 1]), self.in_features)


def vector_at(module: nn.Module, name: str) -> nn.Parameter:
    """The vector that an adapted module keeps under a name.

    Raises:
        StateError: something computes it from other parameters now.
    """
    vector = module._parameters.get(name)
    if vector is None:
        layer = f"{type(module).__name__}({module.extra_repr()})"
        raise StateError(
            f"{name!r} of a {layer} is no parameter any more: it was parametrized or pruned after adapt. Undo that "
            "first (parametrize.remove_parametrizations, prune.remove), or detach before it"
        )
    return vector


def vector_key(module_name: str, parameter: str) -> str:
    """The name of a vector: the module's for its `weight`, else the parameter's own qualified name."""
    return module_name if parameter == "weight" else f"{module_name}.{parameter}".removeprefix(".")


def vector_of(target: str) -> str | None:
    """The name of a vector, from that of the parameter which holds it; None for other parameters."""
    module, _, own = target.rpartition(".")
    if own != VECTOR_NAME and not own.startswith(f"{VECTOR_NAME}_"):
        return None
    return clean_name(f"{module}.{own.removeprefix(VECTOR_NAME).removeprefix('_')}".strip("."))


def calling(module: nn.Module, dims: tuple[int, ...] | None) -> Target:
    """The target of a module that is called: `nn.Linear`, Conv1D, what behaves like one; `dims` as in `Target`."""
    weight = module._parameters.get("weight")
    if dims and weight is not None and is_plain(weight) and weight.ndim == 2:
        return Target(module, "weight", True, dims, (weight.shape[1 - dims[0]],))
    return Target(module, "weight", True, dims, (_size(module, "out_features", "nf"),))


def reading(module: nn.Module, parameter: str, dims: Sequence[int]) -> Target:
    """The target of a weight that is read directly; `dims` are its input axes."""
    weight = module._parameters[parameter]
    assert weight is not None
    shape = tuple(size for axis, size in enumerate(weight.shape) if axis not in dims)
    return Target(module, parameter, False, tuple(sorted(dims)), shape)


def targets_of(module: nn.Module) -> list[Target]:
    """The adapted weights of one module; empty for one that carries no vector."""
    if not isinstance(module, Adapted):
        return []
    if isinstance(module, OneLoRALayer):
        return [calling(module, module._onelora_weights["weight"])]
    return [reading(module, parameter, dims or ()) for parameter, dims in module._onelora_weights.items()]


def attach(targets: Sequence[Target], dtype: torch.dtype | None) -> None:
    """Give every target a zero vector; None is float32, or float64 for a float64 weight."""
    by_module: dict[nn.Module, list[Target]] = {}
    for target in targets:
        by_module.setdefault(target.module, []).append(target)
    for module, own in by_module.items():
        zeros = {target.parameter: _zeros(target, dtype) for target in own}
        attach_vectors(module, own[0].called, {target.parameter: target.dims for target in own}, zeros)


def _zeros(target: Target, dtype: torch.dtype | None) -> Tensor:
    tensors = [*target.module.parameters(recurse=False), *target.module.buffers(recurse=False)]
    stored = target.module._parameters.get(target.parameter)
    like = stored if stored is not None else next(iter(tensors), torch.empty(0))
    default = torch.float64 if like.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(target.shape, dtype=dtype or default, device=device_of_calls(target.module, like.device))
    return split_like_outputs(zeros, like, target.dims or ())


def _size(module: nn.Module, *names: str) -> int:
    size = next(value for name in names if isinstance(value := getattr(module, name, None), int))
    assert isinstance(size, int)
    return size
