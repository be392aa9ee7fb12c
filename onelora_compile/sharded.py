"""Vectors and weights that torch.distributed has split over processes; the file that touches its private API.

Read in torch 2.11 to 2.13: `torch/distributed/_composable_state.py` (which module has which FSDP state) and
`torch/distributed/fsdp/_fully_shard/_fsdp_param.py` (`reset_sharded_param` reads a parameter by `getattr`), and
`torch/distributed/fsdp/_common_utils.py` (`FSDP_FLATTENED`, which marks the parameters of FullyShardedDataParallel).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FULLY_SHARDED = ("FSDPModule", "FullyShardedDataParallel")


def is_fsdp_shard(module: nn.Module, parameter: str) -> bool:
    """Whether FSDP holds this parameter of the module, sharded, so that no forward is using it."""
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for held in getattr(group, "fsdp_params", ()):
                place = held._module_info
                if place.module is module and place.param_name == parameter:
                    return True
                shared = zip(place.shared_modules, place.shared_param_names, strict=True)
                if any(other is module and name == parameter for other, name in shared):
                    return True
    return False


def is_sharded(tensor: object) -> bool:
    """Whether the tensor is split over processes."""
    return type(tensor).__name__ == "DTensor"  # by name: the import is slow, and needless without torch.distributed


def memory_here(tensor: Any) -> int:
    """The address of what this process holds of a tensor; 0 where that is not one piece of memory."""
    here: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    ordinary = type(here) in (Tensor, nn.Parameter) and here.layout == torch.strided
    return here.data_ptr() if ordinary else 0


def is_partial(tensor: Any) -> bool:
    """Whether a tensor that is split over processes is the sum of what they hold (torch.distributed's `Partial`)."""
    return any(placement.is_partial() for placement in tensor.placements)


def reduced_once(tensor: Any) -> Any:
    """The same tensor, whose gradient is split over processes as it is itself.

    A gradient that stays partial is reduced at each use: three times in a step of AdamW.
    """
    return tensor.redistribute(placements=tensor.placements) if is_sharded(tensor) else tensor


def is_fully_sharded(root: Any) -> bool:
    """Whether `fully_shard` or FullyShardedDataParallel was given the model or a part of it, or holds it."""
    kinds = {kind.__name__ for module in root.modules() for kind in type(module).__mro__}
    return not kinds.isdisjoint(_FULLY_SHARDED) or any(map(_is_flattened, root.parameters()))


def is_piece(tensor: Tensor | None) -> bool:
    """Whether a weight is this process's piece of what FullyShardedDataParallel has laid flat: it has one axis."""
    return tensor is not None and tensor.ndim == 1 and _is_flattened(tensor)


def _is_flattened(tensor: Tensor) -> bool:
    return getattr(tensor, "_fsdp_flattened", False)


def split_like_outputs(vector: Tensor, weight: Tensor, dims: Sequence[int]) -> Tensor:
    """A vector that is split over processes as the output axes of its weight are; whole where the inputs are split.

    Args:
        vector: whole, and the same in each process.
        weight: on whichever mesh.
        dims: the input axes of the weight, from 0.
    """
    if not is_sharded(weight):
        return vector
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    split: Any = weight
    outputs = [axis for axis in range(weight.ndim) if axis not in dims]
    axes = [placement.dim if placement.is_shard() else None for placement in split.placements]
    placements = [Shard(outputs.index(axis)) if axis in outputs else Replicate() for axis in axes]
    return distribute_tensor(vector, split.device_mesh, placements, src_data_rank=None)  # nothing is sent


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; of one that is split over processes a copy, for which every process must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def write_whole(tensor: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor; into one that is split over processes each its part of a whole value."""
    if is_sharded(tensor) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = tensor
        # src_data_rank=None: every process has the value, nothing is sent.
        value = distribute_tensor(
            value.to(sharded.device, sharded.dtype), sharded.device_mesh, sharded.placements, src_data_rank=None
        )
    tensor.copy_(value)


@contextlib.contextmanager
def together(tensors: list[Tensor], path: Path) -> Iterator[bool]:
    """One process of those that share the tensors does what is in the block; all leave it when it is done.

    Yields:
        Whether this process is the one.

    Raises:
        OSError: in the other processes, where the one failed.
    """
    if not any(map(is_sharded, tensors)):
        yield True
        return
    failed: list[str | None] = [None]
    mine = torch.distributed.get_rank() == 0
    try:
        yield mine
    except Exception as error:
        failed = [str(error)]
        raise
    finally:
        torch.distributed.broadcast_object_list(failed, src=0)
        if not mine and failed[0] is not None:
            raise OSError(f"rank 0 could not write {path}: {failed[0]}")
