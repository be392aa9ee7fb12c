"""Other tensors in the place of a model's own, for a while: what makes a model its base inside `disabled`.

The tensors are exchanged in the modules that hold them, not their values.  A graph of autograd keeps the tensors that
it was recorded with, so a backward gives the gradients of the forward that it belongs to, inside a block or after it:
none for the vectors from a forward of the base.  Exchanging `.data` did not: autograd reads a vector when backward
runs.  A compiled graph asks its modules for their tensors at each call, so nothing is compiled again.

A stand-in is kept for the next block: CUDA graphs know tensors by their addresses, and a recording for each block would
end in none (Inductor stops at 128).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from onelora_compile.errors import StateError
from onelora_compile.sharded import is_sharded, write_whole

Any_Tensor = TypeVar("Any_Tensor", bound=Tensor)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A stand-in, the values that it was made of (None: zeros), and what tells that it still has them."""

    other: Tensor
    source: Tensor | None
    version: int
    address: int

    def serves(self, tensor: Tensor, source: Tensor | None) -> bool:
        """Whether nobody has written to the stand-in or moved it, and the tensor is as it was."""
        other = self.other
        alike = (other.shape, other.dtype, other.device) == (tensor.shape, tensor.dtype, tensor.device)
        return alike and source is self.source and (other._version, other.data_ptr()) == (self.version, self.address)


# No attributes of modules and tensors: these would be pickled.  After a block no weak reference to a tensor of the
# model is left either: `torch.utils.swap_tensors`, with which PyTorch can convert modules, refuses those.
_kept: weakref.WeakKeyDictionary[nn.Module, dict[str, _Kept]] = weakref.WeakKeyDictionary()  # by place
_meant = WeakTensorKeyDictionary()  # by the stand-in, inside of a block


def meant(tensor: Any_Tensor) -> Any_Tensor:
    """The tensor itself, or the one that it stands in for."""
    reference = _meant.get(tensor) if len(_meant) else None  # outside of blocks a switch asks for hundreds
    own: Any_Tensor | None = reference() if reference is not None else None
    return tensor if own is None else own


def stand_in(root: nn.Module, values: Mapping[Tensor, Tensor | None]) -> Callable[[], None]:
    """Put other values in the place of tensors; what is returned puts the tensors back.

    A checkpoint that is taken meanwhile holds the tensors themselves; loading one is refused.  Sharded tensors stay,
    as FSDP holds on to them, and take the values.

    Args:
        root: the model.
        values: of each of its parameters or buffers that is exchanged; None for zeros.
    """
    exchanged = {id(one): value for one, value in values.items() if not is_sharded(one)}
    sharded = [(one, one.detach().clone(), value) for one, value in values.items() if is_sharded(one)]
    held = [
        (module, name, tensor)
        for module in root.modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None and id(tensor) in exchanged
    ]
    others: dict[int, Tensor] = {}
    for module, name, tensor in held:
        if id(tensor) not in others:
            others[id(tensor)] = _of(module, name, tensor, exchanged[id(tensor)])
    for one, _, value in sharded:
        _write(one, value)
    for module, name, tensor in held:
        setattr(module, name, others[id(tensor)])
    hooks = [root.register_load_state_dict_pre_hook(_refuse_loading)]
    for module in dict.fromkeys(module for module, _, _ in held):
        hooks.append(module.register_state_dict_post_hook(_save_meant))
        if module is not root:
            hooks.append(module.register_load_state_dict_pre_hook(_refuse_loading))

    def put_back() -> None:
        for hook in hooks:
            hook.remove()
        for module, name, tensor in held:
            now = getattr(module, name)
            if (now.dtype, now.device) != (tensor.dtype, tensor.device):  # the model was moved meanwhile
                tensor.data = tensor.data.to(now.device, now.dtype)
            setattr(module, name, tensor)
        for other in others.values():
            _meant.pop(other, None)
        for one, own, _ in sharded:
            _write(one, own)

    return put_back


def _of(module: nn.Module, name: str, tensor: Tensor, source: Tensor | None) -> Tensor:
    """Of the same kind, so that no guard of a compiled graph sees a difference; that of the last block if it serves."""
    here = _kept.setdefault(module, {})
    kept = here.get(name)
    if kept is None or not kept.serves(tensor, source):
        other = _made(tensor, source)
        kept = here[name] = _Kept(other, source, other._version, other.data_ptr())
    other = kept.other
    _meant[other] = weakref.ref(tensor)
    if source is not None and not isinstance(tensor, nn.Parameter):
        other.data.copy_(source)  # batch norms write to their statistics, which `_version` does not count
    other.requires_grad_(tensor.requires_grad)
    other.grad = None
    return other


def _made(tensor: Tensor, source: Tensor | None) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        value = torch.zeros_like(tensor) if source is None else source.to(tensor, copy=True)
        other = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return other


def _write(tensor: Tensor, value: Tensor | None) -> None:
    with torch.no_grad():
        write_whole(tensor, torch.zeros_like(tensor) if value is None else value)


def _refuse_loading(module: nn.Module, *args: Any) -> None:
    raise StateError("can't load a state_dict inside a onelora.disabled block: the values there are the base's")


def _save_meant(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and prefix + name in state_dict and meant(tensor) is not tensor:
            kept = state_dict[prefix + name] is tensor  # keep_vars
            state_dict[prefix + name] = meant(tensor) if kept else meant(tensor).detach()
