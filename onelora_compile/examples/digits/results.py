"""What the demo found, as data: the tables, the figures and results.json are views of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Group

from onelora_compile.examples.digits.deploy import EngineResult, OnnxResult, SwapResult
from onelora_compile.printable import Printable
from onelora_compile.weights.atomic_write import replacing


@dataclasses.dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: of the method.
        accuracy: held-out, on shifted domain A.
        original_accuracy: held-out, on the original domain with the adapter on.
        parameters: trained.
        file_bytes: of the file that the method's users would store; None without training.
        saved_bytes: kept for backward by a training step.
        step_ms: of a training step in eager.
        compiled_ms: the same compiled, where that was measured.
        learning_rate: peak; None without training.
        losses: of each step.
    """

    name: str
    accuracy: float
    original_accuracy: float
    parameters: int
    file_bytes: int | None
    saved_bytes: int
    step_ms: float
    compiled_ms: float | None
    learning_rate: float | None
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class DemoResult(Printable):
    """Everything that was measured.

    Attributes:
        rows: one per method, the unadapted base first.
        onnx: the deployed file.
        engine: the TensorRT engine of that file.
        swap: two adapters in one compiled model.
        base_parameters: of the pretrained model.
        domains: texts by name.
        base_accuracies: of the unadapted model, by domain.
        settings: seed, steps and batch.
        machine: where it ran.
        seconds: wall time by stage, with the total.
        files: what was written.
    """

    rows: list[Row]
    onnx: OnnxResult
    engine: EngineResult
    swap: SwapResult
    base_parameters: int
    domains: dict[str, str]
    base_accuracies: dict[str, float]
    settings: dict[str, int]
    machine: dict[str, str]
    seconds: dict[str, float]
    files: list[Path]

    def __rich__(self) -> Group:
        from onelora_compile.examples.digits import report  # which imports this file

        return Group(report.table(self), report.text(self))

    def row(self, name: str) -> Row:
        """The row of a method."""
        return next(row for row in self.rows if row.name == name)

    def write(self, path: Path) -> None:
        """All numbers as JSON."""
        fields: dict[str, Any] = dataclasses.asdict(self)
        fields["files"] = [file.name for file in self.files]
        with replacing(path) as beside:
            beside.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
