"""What a module does, where its weight can't be read: quantised, packed, or of a class that nobody knows.

A module with `in_features` and `out_features` is a linear if it behaves like one.  Its effect on a few vectors tells
whether it does, how it stores its weight, and the fingerprint of that weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from onelora_compile.kinds import is_linear, is_plain

_ROWS = 8
# int4 kernels that quantise their input too are off by some per cent; a wrong guess is off by its whole size.
_AFFINE = 0.1
_SAME = 1e-3


def linear_like(module: nn.Module) -> tuple[tuple[int, ...] | None, str]:
    """Whether a module that is no `nn.Linear` behaves like a linear.

    Returns:
        The input axes of its `weight` (empty where that is not W or Wᵀ as a plain tensor), and "";
        or None, and the reason why it is not taken for one.
    """
    in_features, out_features = module.in_features, module.out_features
    assert isinstance(in_features, int)
    assert isinstance(out_features, int)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, in_features, generator=generator)
    # f(Σ a x) = Σ a f(x) for weights a that add up to 1: what an affine map does, and little else.
    mix = torch.randn(_ROWS, _ROWS, generator=generator)
    mix = mix / mix.sum(-1, keepdim=True).clamp(min=0.5)
    mix[:, 0] += 1 - mix.sum(-1)
    try:
        y, mixed, zero = effect(module, x), effect(module, mix @ x), effect(module, torch.zeros(1, in_features))
    except Exception as error:  # a module of an unknown class may raise anything
        return None, f"it has in_features and out_features, but a call with one tensor failed: {error}"
    if y.shape != (_ROWS, out_features):
        return None, f"it has in_features and out_features, but returns {list(y.shape)} for {list(x.shape)}"
    if not _close(mixed, mix.double() @ y, _AFFINE):
        return None, "it has in_features and out_features, but its output is not linear in its input"
    weight = module._parameters.get("weight")
    if weight is not None and is_plain(weight) and weight.ndim == 2:
        stored = weight.detach().cpu().double()
        if stored.shape == (out_features, in_features) and _close(y - zero, x.double() @ stored.T, _SAME):
            return (1,), ""
        if stored.shape == (in_features, out_features) and _close(y - zero, x.double() @ stored, _SAME):
            return (0,), ""
    return (), ""


def may_be_linear(module: nn.Module) -> bool:
    """Whether `linear_like` should be asked: sizes of a linear on a module of another class, without children."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    named = all(isinstance(size, int) and size > 0 for size in sizes)
    return named and not is_linear(module) and next(module.children(), None) is None


def effect(module: nn.Module, x: Tensor) -> Tensor:
    """Output of the module for x [n, in_features], float64 on the CPU; the module is as before.

    Raises:
        RuntimeError: it takes none of the floating dtypes.
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else x.device
    training = module.training
    failed: Exception | None = None
    try:
        module.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for dtype in _dtypes(tensors):
                try:
                    return module(x.to(device, dtype)).detach().cpu().double()
                except (RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError) as error:
                    failed = failed or error
    finally:
        module.train(training)
    assert failed is not None
    raise failed


def _dtypes(tensors: list[Tensor]) -> Iterator[torch.dtype]:
    """Dtypes to try: those of the module's own floating tensors first."""
    own = dict.fromkeys(t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize >= 2)
    yield from dict.fromkeys([*own, torch.float32, torch.bfloat16, torch.float16])


def base_effect(module: nn.Module, x: Tensor) -> Tensor:
    """W x for x [n, in_features], without bias and vector, whatever the class of the module."""
    from onelora_compile.layer import is_adapted, remove

    plain = module
    if is_adapted(module):
        # Shares the weight. Not copy.copy: parametrised modules refuse it.
        plain = object.__new__(type(module))
        plain.__dict__.update(module.__dict__)
        plain._parameters = dict(module._parameters)
        remove(plain)
    return effect(plain, x) - effect(plain, torch.zeros(1, x.shape[1]))


def _close(actual: Tensor, expected: Tensor, relative: float) -> bool:
    return bool((actual - expected).norm() <= relative * expected.norm().clamp(min=1e-30))
