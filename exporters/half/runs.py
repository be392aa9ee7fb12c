"""What a model of any mode is run on to measure its ranges: inputs, with every adapter that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.exporters.half.ranges import TensorRange, measure
from onelora_compile.exporters.jetson.device.core.modes import IDS, Mode
from onelora_compile.exporters.onnx_runtime.feeds import feeds

if TYPE_CHECKING:
    import onnx_ir

Vectors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of a model.

    Attributes:
        mode: of the model.
        names: what an adapter gives it.
        held: values for these.
        bank: how many adapters its tables hold.
        inputs: see `feeds`.
        input_names: what a call gives.
        zeros: whether to run without an adapter too; not where trained heads replace what is not known.
    """

    mode: Mode
    names: Sequence[str]
    held: Vectors
    bank: int
    inputs: Any
    input_names: Sequence[str]
    zeros: bool = True

    def measured(self, model: onnx_ir.Model) -> dict[str, TensorRange]:
        """The ranges of a model over all of them."""
        return measure(model, self.feeds(), self.names if self.mode.takes_files else ())

    def feeds(self) -> Iterator[dict[str, Any]]:
        """What is fed in each run."""
        for feed in feeds(self.inputs, self.input_names):
            for vectors in self._adapters(feed):
                yield feed | vectors

    def _adapters(self, feed: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        if self.mode.feeds_ids:
            rows = len(next(iter(feed.values())))
            for number in range(self.bank + 1):  # the last row of a table is the base
                yield {IDS: np.full(rows, number, np.int64)}
        elif self.mode.takes_files:
            own = {name: np.asarray(self.held[name], np.float32) for name in self.names}
            yield own
            if self.zeros:
                yield {name: np.zeros_like(value) for name, value in own.items()}
        else:
            yield {}
