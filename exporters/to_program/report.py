"""What an export wrote and how good it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from onelora_compile.exporters.calls.compare import Parity
from onelora_compile.exporters.half.convert import Mixed
from onelora_compile.printable import Printable, bytes_text
from onelora_compile.table import Table
from onelora_compile.weights.merge import FoldLoss


@dataclasses.dataclass(frozen=True)
class ExportReport(Printable):
    """What an export wrote and how good it is.

    Attributes:
        files: the model file, and the file of its weights where it needs one.
        bytes: of all files together.
        runtime: for which it is, as its makers call it.
        opset_version: of the standard ONNX operators; None of a file that is not ONNX.
        mode: "fold", "load", "input" or "bank"; "base" for a model that is not adapted.
        vectors: how many the file holds or was folded with.
        losses: what rounding lost in each folded weight, by module name.
        unused: modules whose vector the graph does not use.
        captured_for: what dynamic sizes must be for the file to be right (`batch <= 3`), beside 2 or more: a model that
            branches on a size was captured for the branch that the example takes.
        parity: the difference to eager on the example inputs; None without verification.
        seconds: wall time.
        mixed: what stays in float32 of a model that was converted with `keep_float32`.
    """

    files: list[Path]
    bytes: int
    runtime: str
    opset_version: int | None
    mode: str
    vectors: int
    losses: dict[str, FoldLoss]
    unused: list[str]
    captured_for: list[str]
    parity: Parity | None
    seconds: float
    mixed: Mixed | None = None

    @property
    def error(self) -> float | None:
        """The largest relative difference to eager, None without verification."""
        return None if self.parity is None else self.parity.relative

    def __rich__(self) -> Table:
        table = Table(title=f"exported {self.files[0]}", show_header=False)
        table.add_row("files", "\n".join(str(file) for file in self.files))
        table.add_row("size", bytes_text(self.bytes))
        if self.opset_version is not None:
            table.add_row("opset", str(self.opset_version))
        if self.mode == "base":
            table.add_row("vectors", "none: the model is not adapted")
        elif self.mode == "fold":
            worst = max((loss.relative for loss in self.losses.values()), default=0.0)
            table.add_row("vectors folded", f"{len(self.losses)} (lost to rounding: at most {worst:.1e} of the update)")
        else:
            table.add_row("vectors", f"{self.vectors}, mode {self.mode!r}")
        if self.mixed is not None:
            table.add_row("float16", str(self.mixed))
        if self.unused:
            table.add_row("not in the graph", ", ".join(self.unused))
        if self.captured_for:
            table.add_row("right only for", "\n".join(self.captured_for))
        if self.parity is None:
            table.add_row("verified", "no")
        else:
            table.add_row("verified", f"{self.runtime} against eager: {self.parity.relative:.1e} relative, passed")
        table.add_row("time", f"{self.seconds:.1f} s")
        return table
