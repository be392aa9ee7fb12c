"""Other tensors in the place of a model's own, for a while: what makes a model its base inside `disabled`.

The tensors are exchanged in the modules that hold them, not their values.  A graph of autograd keeps the tensors that
it was recorded with, so a backward gives the gradients of the forward that it belongs to, inside a block or after it:
none for the vectors from a forward of the base.  Exchanging `.data` did not: autograd reads a vector when backward
runs.  A compiled graph asks its modules for their tensors at each call, so nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from onelora_compile.errors import StateError
from onelora_compile.sharded import is_sharded, write_whole

_MEANT = "_onelora_meant"  # attribute of a stand-in: the tensor in whose place it is
Any_Tensor = TypeVar("Any_Tensor", bound=Tensor)


def meant(tensor: Any_Tensor) -> Any_Tensor:
    """The tensor itself, or the one that it stands in for."""
    own: Any_Tensor = getattr(tensor, _MEANT, tensor)
    return own


def stand_in(root: nn.Module, values: Mapping[Tensor, Tensor]) -> Callable[[], None]:
    """Put other values in the place of tensors; what is returned puts the tensors back.

    A checkpoint that is taken meanwhile holds the tensors themselves; loading one is refused.  Sharded tensors stay,
    as FSDP holds on to them, and take the values.

    Args:
        root: the model.
        values: of each of its parameters or buffers that is exchanged, of the same shape, dtype and device.
    """
    others = {id(one): _of(one, value) for one, value in values.items() if not is_sharded(one)}
    sharded = [(one, one.detach().clone(), value) for one, value in values.items() if is_sharded(one)]
    held = [
        (module, name, tensor)
        for module in root.modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None and id(tensor) in others
    ]
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
        for one, own, _ in sharded:
            _write(one, own)

    return put_back


def _of(tensor: Tensor, value: Tensor) -> Tensor:
    """Of the same kind, so that no guard of a compiled graph sees a difference."""
    other = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    setattr(other, _MEANT, tensor)
    return other


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        write_whole(tensor, value)


def _refuse_loading(module: nn.Module, *args: Any) -> None:
    raise StateError("can't load a state_dict inside a onelora.disabled block: the values there are the base's")


def _save_meant(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and prefix + name in state_dict and meant(tensor) is not tensor:
            kept = state_dict[prefix + name] is tensor  # keep_vars
            state_dict[prefix + name] = meant(tensor) if kept else meant(tensor).detach()
