"""The tables of a bank in memory of this process, with room for rows that come while the bank runs.

ONNX Runtime takes the values of an initializer from whoever opens a session (`SessionOptions.add_initializer`), also in
another shape than that of the file, and reads them where they lie.  So a row that is written now is there at the next
call.  A call chooses by ids of adapters that are known, and an adapter becomes known after all its rows are written.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ConfigError, ExportError, StateError, require
from onelora_compile.exporters.jetson.device.core.names import why_no_name
from onelora_compile.exporters.onnx_file.load import load_model, read_tensor
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.weights.adapter_content import digest
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter

if TYPE_CHECKING:
    import onnxruntime

_CPU = ["CPUExecutionProvider"]  # others copy what they are given, or compile it in


class BankTables:
    """Tables [adapters + room + 1, …] of float32, the last row the base's.

    Attributes:
        metadata: of the bank, with the adapters that it has now; replaced as a whole by each that comes.

    Args:
        path: of the bank.
        room: how many adapters can be added.
        providers: that the session is opened with.

    Raises:
        StateError: no bank, or one that does not say how its tables are filled, or that a tool has rewritten.
        ConfigError: other providers than the CPU's, or a room that is no count.
        ExportError: not an ONNX model.
    """

    def __init__(self, path: Path, room: int, providers: Sequence[str]) -> None:
        if isinstance(room, bool) or not isinstance(room, int) or room < 0:
            raise ConfigError(f"room={room!r}: how many adapters can be added is a number from 0 on")
        if list(providers) != _CPU:
            raise ConfigError(
                f"room={room} needs providers={_CPU}; with {list(providers)} tables are copied or compiled"
            )
        model = load_model(path)
        self.path, self.room = path, room
        self.metadata = Metadata.from_props(model.metadata_props, str(path))
        if not self.metadata.traits.feeds_ids:
            raise StateError(f"{path} is of mode {self.metadata.mode!r}: only a bank has room for more adapters")
        if not self.metadata.tables:
            raise StateError(
                f"{path} does not say which part of an adapter each of its tables holds: an older version wrote it, or "
                "parts of its vectors are not regular. Export the bank again, with all its adapters"
            )
        held: dict[str, Any] = {name: value.const_value for name, value in model.graph.initializers.items()}
        for name, source in self.metadata.tables.items():
            shape = None if held.get(name) is None else tuple(held[name].shape)
            if shape is None or (shape[0], len(shape)) != (len(self.metadata.adapters) + 1, len(source.strides) + 1):
                raise StateError(
                    f"{path} has no table {name!r} of all its adapters: a tool rewrote it; export it again"
                )
        self._tables = {name: self._roomy(read_tensor(held[name])) for name in self.metadata.tables}
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()

    def _roomy(self, table: np.ndarray) -> np.ndarray:
        # Zeros are not written, so that free rows take no memory.
        wide = np.zeros((len(table) + self.room, *table.shape[1:]), np.float32)
        wide[: len(table) - 1], wide[-1] = table[:-1], table[-1]
        return wide

    def give_to(self, options: onnxruntime.SessionOptions) -> None:
        """Let a session that is opened with these options read the tables here."""
        runtime = require("onnxruntime", "onnx", "run an ONNX model")
        for name, table in self._tables.items():
            value = runtime.OrtValue.ortvalue_from_numpy(table)
            if value.data_ptr() != table.ctypes.data:
                raise ExportError(
                    f"this ONNX Runtime ({runtime.__version__}) copies what it is given: no room for more"
                )
            self._values[name] = value
            options.add_initializer(name, value)

    def add(self, adapter: str | os.PathLike[str] | AdapterFile, name: str | None) -> int:
        """Write an adapter into free rows; as `OnnxRunner.add_adapter`."""
        name = _named(adapter, name)
        file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
        self.metadata.check_fits(file, str(self.path), whole=False)
        values = self.metadata.values_of(file)
        with self._lock:
            known = self.metadata
            row = self._free_row(name)
            for table, source in known.tables.items():
                rows = self._tables[table]
                rows[row] = source.row(values[source.name], rows.shape[1:]) if source.name in values else rows[-1]
            self.metadata = dataclasses.replace(
                known,
                adapters=(*known.adapters, name),
                digests=(*known.digests, digest(values)),
            )
        return row

    def _free_row(self, name: str) -> int:
        known = self.metadata.adapters
        if name in known:
            raise StateError(f"{self.path} has an adapter {name!r} already: add it under another name")
        if len(known) + 1 >= len(next(iter(self._tables.values()))):
            raise StateError(
                f"{self.path} has no room for {name!r}: it was opened for {self.room} more adapters than its file has; "
                "open it with more room"
            )
        return len(known)


def _named(adapter: str | os.PathLike[str] | AdapterFile, name: str | None) -> str:
    if name is None and not isinstance(adapter, AdapterFile):
        name = Path(adapter).name.removesuffix(".safetensors")
    if not isinstance(name, str) or not name or name.endswith(".safetensors"):
        raise ConfigError(f"name={name!r}: an adapter of a bank has a name, not empty, and not that of a file")
    if why := why_no_name(name):
        raise ConfigError(f"name={name!r} is no name of an adapter, as {why}")
    return name
