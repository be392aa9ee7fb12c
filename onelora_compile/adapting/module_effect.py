"""What a module does to a few vectors, in whatever dtype it takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import detach_vectors, is_adapted, is_vector, made_by_attach
from onelora_compile.kinds import is_plain
from onelora_compile.looking.twin import no_trace, twin_of

_BLOCK = 65521  # numbers that are drawn for a large weight, which repeats them: a prime, so that no two rows agree


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
    plain = without_vector(module)
    return effect(plain, x) - effect(plain, torch.zeros_like(x[:1]))


def without_vector(module: nn.Module) -> nn.Module:
    """The module itself, or the base of an adapted one, which shares its weight."""
    if not is_adapted(module):
        return module
    plain = object.__new__(type(module))  # not copy.copy: parametrised modules refuse it
    plain.__dict__.update(module.__dict__)
    plain._parameters = dict(module._parameters)
    if made_by_attach(module):
        detach_vectors(plain)
    else:  # a tool has made another class of that one (parametrized): its vectors are zeros
        vectors = {name: value for name, value in plain._parameters.items() if is_vector(name) and value is not None}
        plain._parameters |= {name: nn.Parameter(torch.zeros_like(one), False) for name, one in vectors.items()}
    return plain


def copied(tensor: Tensor) -> Tensor:
    """A tensor of the same kind with the same numbers."""
    with torch.no_grad():
        made = tensor.detach().clone()
    return nn.Parameter(made, requires_grad=False) if type(tensor) is nn.Parameter else made


def random_like(tensor: Tensor) -> Tensor:
    """Other numbers of the same kind, in float32: what holds for them holds whatever the numbers are."""
    if not tensor.is_floating_point() or not is_plain(tensor):
        return copied(tensor)
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    block = torch.rand(min(tensor.numel(), _BLOCK), generator=torch.Generator().manual_seed(2), device="cpu") - 0.3
    block = block.to(device, dtype)
    times = -(-tensor.numel() // max(1, len(block)))
    made = block.repeat(times)[: tensor.numel()].view(tensor.shape)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
