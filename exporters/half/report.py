"""Ranges of a model's values, before and after an adapter."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onelora_compile.errors import StateError, require
from onelora_compile.exporters.fold.fold import fold_onnx
from onelora_compile.exporters.half.ranges import LARGEST, STORED, TensorRange
from onelora_compile.exporters.half.runs import Runs
from onelora_compile.exporters.jetson.device.core.modes import IDS
from onelora_compile.exporters.onnx_file.load import load_model, read_tensor
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.file_names import as_path
from onelora_compile.printable import Printable, shortened
from onelora_compile.table import Table
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter

_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class RangeReport(Printable):
    """What the values of a model are on inputs; `print` shows those that float16 holds worst.

    Attributes:
        file: the model.
        tensors: by name, in the order of the graph, constants first: with the adapter in use.
        before: the same without an adapter; empty where the file does not tell.
    """

    file: Path
    tensors: dict[str, TensorRange]
    before: dict[str, TensorRange]

    @property
    def passed(self) -> bool:
        """Whether float16 holds everything that the file has in float16."""
        return not self.broken

    @property
    def broken(self) -> list[TensorRange]:
        """What the file has in float16, and overflows there, in the order of the graph."""
        return [one for one in self.tensors.values() if one.broken]

    def worst(self) -> list[TensorRange]:
        """The values in the order of their headroom; what only float32 holds comes first."""
        return sorted(self.tensors.values(), key=lambda one: one.headroom)

    def __rich__(self) -> Table:
        table = Table(title=f"{self.file}: {self._summary()}")
        for column in ("value", "made by", "in the file", "largest", "headroom", "before", "zero in float16", ""):
            table.add_column(column)
        for one in self._shown():
            before = self.before.get(one.name)
            table.add_row(
                one.name,
                one.op,
                one.dtype,
                f"{one.largest:.3g}",
                f"{one.headroom:.2g}x",
                "-" if before is None else f"{before.largest:.3g}",
                f"{one.vanished:.1%}",
                _verdict(one),
            )
        return table

    def _summary(self) -> str:
        over = sum(one.overflows for one in self.tensors.values())
        under = sum(one.underflows for one in self.tensors.values())
        held = f"{len(self.broken)} of these are float16 in the file" if over else "none"
        return f"{len(self.tensors)} values, {over} beyond {LARGEST:.0f} ({held}), {under} only below 2^-14"

    def _shown(self) -> list[TensorRange]:
        bad = [one for one in self.worst() if one.overflows]
        small = [one for one in self.worst() if one.underflows and one.op != STORED]
        small = [*(one for one in self.worst() if one.lost), *small]
        rest = [one for one in self.worst() if one not in bad and one not in small]
        return [*bad[:_SHOWN], *small[: _SHOWN // 2], *rest[: max(0, _SHOWN - len(bad))]]


def _verdict(one: TensorRange) -> str:
    found = ["OVERFLOWS" if one.broken else "needs float32"] if one.overflows else []
    found += ["zero in float16"] if one.lost else ["loses bits"] if one.underflows else []
    found += ["NaN"] if one.nan else [] if one.finite else ["infinite in float32 too"]
    found += ["constant"] if one.constant and one.op != STORED else []
    return ", ".join(found)


def ranges(
    onnx: str | os.PathLike[str], inputs: Any, adapter: str | os.PathLike[str] | AdapterFile | None = None
) -> RangeReport:
    """Measure every floating value of a model on inputs, and what float16 makes of it.

    Measured in float32, also where the file has float16: that is what its values would be.

    Args:
        onnx: a model of `export_onnx` or `fold_onnx`, or of another tool.
        inputs: one input or several: arrays by name, or in order; as `calibration` of `fold_onnx`.
        adapter: for a base, one that is folded first; for modes "load" and "input", in the place of their own. A bank
            is measured with all of its adapters.

    Raises:
        ConfigError: there are no inputs, or they do not fit the model.
        StateError: a model whose vectors have no values, without an adapter.
        AdapterFileError, BaseMismatchError: the adapter does not belong to the model.
        ExportError: not a model, or ONNX Runtime can't run it.
        MissingExtraError: onnxruntime is not installed.
    """
    path = as_path(onnx, "onnx")
    require("onnxruntime", "onnx", "measure ranges")
    metadata = Metadata.from_props(dict(load_model(path).metadata_props), str(path))
    if metadata.traits.takes_files:
        file = read_adapter(adapter) if isinstance(adapter, str | os.PathLike) else adapter
        if file is not None:
            metadata.check_fits(file, str(path))
        values = metadata.values_of(file) if file is not None else _own(path, metadata)
        after = _measured(path, inputs, metadata, values)
        zeros = {name: np.zeros_like(value) for name, value in values.items()}
        return RangeReport(path, after, {} if metadata.trained else _measured(path, inputs, metadata, zeros))
    if adapter is not None:
        return RangeReport(path, _folded(path, inputs, adapter), _measured(path, inputs, metadata, {}))
    return RangeReport(path, _measured(path, inputs, metadata, {}), {})


def _folded(path: Path, inputs: Any, adapter: Any) -> dict[str, TensorRange]:
    with tempfile.TemporaryDirectory(prefix="onelora-") as folder:
        fold_onnx(path, adapter, folded := Path(folder) / "folded.onnx", progress=False)
        return _measured(folded, inputs, Metadata.from_props(dict(load_model(folded).metadata_props), ""), {})


def _own(path: Path, metadata: Metadata) -> dict[str, np.ndarray]:
    held = load_model(path).graph.initializers
    if absent := [name for name in metadata.vectors if name not in held]:
        raise StateError(f"{path} has no values for its vectors ({shortened(absent)}), as in a bundle: give adapter=")
    return {name: read_tensor(held[name].const_value) for name in metadata.vectors}


def _measured(path: Path, inputs: Any, metadata: Metadata, values: Mapping[str, np.ndarray]) -> dict[str, TensorRange]:
    model = load_model(path)
    given = [str(value.name) for value in model.graph.inputs if value.const_value is None]
    names = [name for name in given if name != IDS and name not in values]
    runs = Runs(metadata.traits, list(values), values, len(metadata.adapters), inputs, names, zeros=False)
    return runs.measured(model)
