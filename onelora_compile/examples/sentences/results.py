"""What the demo found, as data: the table, the figures and results.json are views of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Group

from onelora_compile.printable import Printable
from onelora_compile.weights.atomic_write import replacing


@dataclasses.dataclass(frozen=True)
class Row:
    """One method on the first task.

    Attributes:
        name: of the method.
        accuracy: on the test sentences.
        numbers: trained, the head's among them.
        file_bytes: of the file that the method's users would store.
        kept_bytes: kept for backward by one training step.
        step_ms: of that step in eager.
        learning_rate: peak.
        losses: of each step.
    """

    name: str
    accuracy: float
    numbers: int
    file_bytes: int
    kept_bytes: int
    step_ms: float
    learning_rate: float
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One adapter.

    Attributes:
        question: of its task.
        majority: share of the more frequent answer among the test sentences.
        accuracies: of this adapter on the test sentences of each task, in PyTorch.
        bytes: of its file.
        examples: test sentences that no training saw, with the answer given and the right one.
    """

    question: str
    majority: float
    accuracies: dict[str, float]
    bytes: int
    examples: list[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class SwapResult:
    """The adapters, loaded in turns into one compiled model.

    Attributes:
        loads: how many files were loaded.
        milliseconds: median of one load: read, check against the base, copy.
        recompiled: graphs that Dynamo made meanwhile; 0 is the promise.
        disabled_is_base: whether the disabled model gives the very features of the base, both in eager.
    """

    loads: int
    milliseconds: float
    recompiled: int
    disabled_is_base: bool


@dataclasses.dataclass(frozen=True)
class BankResult:
    """One ONNX Runtime session for all tasks.

    Attributes:
        rows: sentences in the mixed batch, each with the adapter of its task.
        other_answers: rows whose answer differs from that of the single adapter in PyTorch.
        difference: the largest between the logits of the two.
        bytes: of the file.
    """

    rows: int
    other_answers: int
    difference: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class FoldedFile:
    """The first adapter inside the weights of an ONNX file.

    Attributes:
        bytes: of the file.
        nodes: of its graph.
        base_nodes: of the base's graph.
        accuracy: on the test sentences, in ONNX Runtime.
        difference: the largest between its logits and those of PyTorch.
    """

    bytes: int
    nodes: int
    base_nodes: int
    accuracy: float
    difference: float


@dataclasses.dataclass(frozen=True)
class EngineResult:
    """The engine of that file, built without a GPU and not run.

    Attributes:
        built_by: product and version; "" where none is installed.
        why_not: why there is no engine, "" where there is one.
        targets: the GPUs that it is for.
        bytes: of the file.
        seconds: of reading the model and building.
    """

    built_by: str
    why_not: str
    targets: tuple[str, ...]
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class DemoResult(Printable):
    """Everything that was measured.

    Attributes:
        rows: one per method, on the first task.
        tasks: one per adapter of 1LoRA, by name; the first is that of the rows.
        swap: the adapters in one compiled model.
        bank: the adapters in one ONNX Runtime session.
        fold: one adapter inside an ONNX file.
        engine: the TensorRT engine of that file.
        base_numbers: parameters of the encoder.
        settings: seed, steps, batch and numbers of sentences.
        machine: where it ran.
        seconds: wall time by stage, with the total.
        files: what was written.
    """

    rows: list[Row]
    tasks: dict[str, TaskResult]
    swap: SwapResult
    bank: BankResult
    fold: FoldedFile
    engine: EngineResult
    base_numbers: int
    settings: dict[str, int]
    machine: dict[str, str]
    seconds: dict[str, float]
    files: list[Path]

    def __rich__(self) -> Group:
        from onelora_compile.examples.sentences import report  # which imports this file

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
