"""What a bundle holds, for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onelora_compile.exporters.jetson.device.measure import Check
from onelora_compile.printable import Printable, bytes_text
from onelora_compile.table import Table


@dataclass(frozen=True)
class BundleReport(Printable):
    """What a bundle holds.

    Attributes:
        folder: where it is.
        bytes: of all its files.
        jetpack: for which it is made.
        tensorrt: of that JetPack.
        mode: how an adapter reaches the model there: "fold", "load", "input", "bank", "refit" or "base".
        adapters: names of those that can be used without a new bundle.
        opset_version: of the model in it.
        types: what the engine will compute in.
        notes: what was changed in the model, and what to know.
        checks: the bundle's own self-test in ONNX Runtime; empty without.
        seconds: wall time.
    """

    folder: Path
    bytes: int
    jetpack: str
    tensorrt: str
    mode: str
    adapters: list[str]
    opset_version: int
    types: str
    notes: list[str]
    checks: list[Check]
    seconds: float

    def __rich__(self) -> Table:
        table = Table(title=f"bundle {self.folder}", show_header=False)
        table.add_row("for", f"JetPack {self.jetpack}, TensorRT {self.tensorrt}")
        table.add_row("size", bytes_text(self.bytes))
        table.add_row("mode", self.mode)
        table.add_row("adapters", ", ".join(self.adapters) or "none")
        table.add_row("opset", str(self.opset_version))
        table.add_row("types", self.types)
        for note in self.notes:
            table.add_row("note", note)
        if self.checks:
            worst = max(check.relative for check in self.checks)
            table.add_row("checked", f"in ONNX Runtime: {len(self.checks)} comparisons, at most {worst:.1e} relative")
        else:
            table.add_row("checked", "no, and the device can't either (selftest=False)")
        table.add_row("not checked", "TensorRT: run `python3 build_and_run.py build` and `selftest` on the device")
        table.add_row("time", f"{self.seconds:.1f} s")
        return table
