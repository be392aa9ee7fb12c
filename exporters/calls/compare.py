"""How two computations of the same outputs differ, and how much of that rounding explains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from onelora_compile.errors import ExportError

# Largest difference over the largest magnitude of an output that rounding in this dtype explains.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class Parity:
    """How two computations of the same outputs differ.

    Attributes:
        absolute: the largest difference of any output entry.
        relative: the same over the largest magnitude in its output; the worst output counts.
        tolerance: what `relative` may be for the outputs' dtype.
        output: the name of the worst output.
        entries: how many numbers of it were compared; 0 of an output that is empty on these inputs.
    """

    absolute: float
    relative: float
    tolerance: float
    output: str
    entries: int

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance


def compare(expected: Sequence[Tensor], actual: Sequence[Tensor], names: Sequence[str]) -> Parity:
    """The parity of the worst output; see `compare_all`."""
    return max(compare_all(expected, actual, names), key=badness)


def compare_all(expected: Sequence[Tensor], actual: Sequence[Tensor], names: Sequence[str]) -> list[Parity]:
    """The parity of every output.

    Raises:
        ExportError: another number of outputs, an output of another shape, one without plain numbers, or no entry in
            any, which proves nothing.
    """
    if len(expected) != len(actual):
        raise ExportError(f"the file has {len(actual)} outputs {list(names)}, the model {len(expected)}")
    found = []
    for name, want, got in zip(names, expected, actual, strict=True):
        if want.shape != got.shape:
            raise ExportError(f"output {name!r} is {list(got.shape)}, the model's is {list(want.shape)}")
        if odd := _not_plain(want) or _not_plain(got):
            raise ExportError(
                f"output {name!r} is {odd}, which can't be compared: return it as a dense tensor, or leave it out"
            )
        found.append(_compare_one(name, want.detach().cpu(), got.detach().cpu()))
    if not found:
        raise ExportError("the model has no tensor among its outputs, so there is nothing to compare")
    if not any(parity.entries for parity in found):
        raise ExportError(
            f"every output is empty on these inputs ({list(names)}, the first {list(expected[0].shape)}), so nothing "
            "was compared: give inputs with rows"
        )
    return found


def _not_plain(tensor: Tensor) -> str:
    """What keeps the numbers of a tensor from being read; "" if nothing does."""
    if isinstance(tensor, torch._subclasses.FakeTensor):
        return "a tensor without values, of torch.func inside torch.export"
    if tensor.is_meta or tensor.is_quantized:
        return "on the device 'meta'" if tensor.is_meta else f"of the dtype {tensor.dtype}"
    return "" if tensor.layout == torch.strided else f"of the layout {tensor.layout}"


def badness(parity: Parity) -> float:
    """How far a difference is on the way to its tolerance, to find the worst."""
    ratio = parity.relative / parity.tolerance
    return ratio if ratio == ratio else float("inf")  # NaN is the worst


def _compare_one(name: str, want: Tensor, got: Tensor) -> Parity:
    # Integers and booleans are equal; a file may be of a narrower dtype than the model.
    tolerance = max(TOLERANCE.get(tensor.dtype, 1e-9) for tensor in (want, got))
    wide, found = want.to(torch.float64), got.to(torch.float64)
    same = (wide == found) | (wide.isnan() & found.isnan())  # also equal infinities
    difference = torch.where(same, 0.0, (wide - found).abs())
    absolute = float(difference.max()) if difference.numel() else 0.0
    finite = wide[wide.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return Parity(absolute, absolute / max(scale, 1e-12) if absolute else 0.0, tolerance, name, want.numel())
