"""What a module does to a few vectors, in whatever dtype it takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import is_adapted, remove
from onelora_compile.looking.twin import no_trace, twin_of


def effect(module: nn.Module, x: Tensor) -> Tensor:
    """Output of the module for x [n, in_features], float64 on the CPU; the module is as before.

    Raises:
        RuntimeError: it takes none of the floating dtypes.
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else x.device
    failed: Exception | None = None
    with no_trace(module):
        twin = twin_of(module, copied)
        for dtype in _dtypes(tensors):
            try:
                y: Tensor = twin(x.to(device, dtype))
                return y.detach().cpu().double()
            except (RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError) as error:
                failed = failed or error
    assert failed is not None
    raise failed


def _dtypes(tensors: list[Tensor]) -> Iterator[torch.dtype]:
    """Dtypes to try: those of the module's own floating tensors first."""
    own = dict.fromkeys(t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize >= 2)
    yield from dict.fromkeys([*own, torch.float32, torch.bfloat16, torch.float16])


def base_effect(module: nn.Module, x: Tensor) -> Tensor:
    """W x for x [n, in_features], without bias and vector, whatever the class of the module."""
    plain = module
    if is_adapted(module):
        # Shares the weight. Not copy.copy: parametrised modules refuse it.
        plain = object.__new__(type(module))
        plain.__dict__.update(module.__dict__)
        plain._parameters = dict(module._parameters)
        remove(plain)
    return effect(plain, x) - effect(plain, torch.zeros(1, x.shape[1]))


def copied(tensor: Tensor) -> Tensor:
    """A tensor of the same kind with the same numbers."""
    with torch.no_grad():
        made = tensor.detach().clone()
    return nn.Parameter(made, requires_grad=False) if type(tensor) is nn.Parameter else made
