"""What folding an adapter into an ONNX model did, as data and as a table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from onelora_compile.exporters.quantized.saturation import Saturation
from onelora_compile.printable import Printable, bytes_text, shortened
from onelora_compile.table import Table, grouped, spread
from onelora_compile.weights.merge import FoldLoss


@dataclasses.dataclass(frozen=True)
class FoldedVector:
    """Where one vector went.

    Attributes:
        where: names of the initializers.
        how: "weight", "zero points" or "branch".
        loss: what rounding lost; None where nothing is rounded.
    """

    where: tuple[str, ...]
    how: str
    loss: FoldLoss | None


@dataclasses.dataclass(frozen=True)
class FoldReport(Printable):
    """What `fold_onnx` did.

    Attributes:
        files: that were written.
        bytes: of all files together.
        folded: where each vector went.
        skipped: vectors without a place, with the reason; without `on_unmatched="skip"` only those of zeros.
        saturation: what became of the static quantisers behind the vectors, whose ranges were calibrated on the base.
        missing_uses: of weights that the file uses less often than the model may: how often there, and in the model.
        replaced: other trained tensors (modules_to_save, norms) that took the place of their base values.
        fixed: initializers that a call could give, and can't any more: weights hold what was computed from them.
        seconds: wall time.
    """

    files: list[Path]
    bytes: int
    folded: dict[str, FoldedVector]
    skipped: dict[str, str]
    replaced: list[str]
    saturation: Saturation
    missing_uses: dict[str, tuple[int, int]]
    fixed: list[str]
    seconds: float

    def __rich__(self) -> Table:
        size = f"{bytes_text(self.bytes)}, {self.seconds:.1f} s"
        table = Table(title=f"folded {len(self.folded)} vectors into {self.files[0]} ({size})")
        for column in ("vector", "went into", "how", "lost to rounding"):
            table.add_column(column)
        for name, ones in grouped(self.folded.items(), alike=lambda one: (one.how, one.loss is None)).items():
            losses = [one.loss.relative for one in ones if one.loss is not None]
            places = [place for one in ones for place in one.where]
            table.add_row(name, shortened(places, 3), ones[0].how, spread(losses, ".1e") if losses else "nothing")
        for name, (reason, *_) in grouped(self.skipped.items(), alike=str).items():
            table.add_row(name, "-", f"skipped: {reason}", "-")
        for name in grouped((name, None) for name in self.replaced):
            table.add_row(name, name, "replaced as it was trained", "-")
        notes = [str(self.saturation)] if self.saturation.quantizers else []
        if self.missing_uses:
            listed = shortened([f"{name} {there} of {times}" for name, (there, times) in self.missing_uses.items()])
            notes.append(f"uses in the file, of those that the model may have: {listed}; the others stay the base's")
        if self.fixed:
            notes.append(f"no inputs of the file any more, as weights were computed from them: {shortened(self.fixed)}")
        table.caption = "; ".join(notes) or None
        return table
