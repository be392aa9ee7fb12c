"""Where the numbers of a bank's tables come from, so that a file that exists can be given more rows.

A table's row is a part of a vector, or a head's weight turned round.  Which one, no graph tells once it is computed; so
the exporter sends numbers through that are their own places, as if they were adapters, and reads what arrives:

    table[row].flat[i] = tensor[name].flat[offset + strides · index(i)]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onelora_compile.exporters.jetson.device.core.modes import IDS
from onelora_compile.exporters.onnx_file.metadata import TableSource

if TYPE_CHECKING:
    import onnx_ir

_BASE = 256  # digits that every dtype of a model holds exactly, bfloat16 too


class PlaceNumbers:
    """Adapters whose values say where they stand: each number's place among all, one digit for each adapter.

    Args:
        tensors: what an adapter gives, by name.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._sizes = {name: value.size for name, value in tensors.items()}
        self._starts = dict(zip(self._sizes, np.cumsum([0, *self._sizes.values()]).tolist(), strict=False))
        count, total = 1, sum(self._sizes.values())
        while _BASE**count < total:
            count += 1
        self.adapters = [
            {
                name: self._digits(self._starts[name], value.size, place).reshape(value.shape)
                for name, value in tensors.items()
            }
            for place in range(count)
        ]

    @staticmethod
    def _digits(start: int, size: int, place: int) -> np.ndarray:
        return (np.arange(start, start + size) // _BASE**place % _BASE).astype(np.float32)

    def take_out(self, model: onnx_ir.Model) -> dict[str, TableSource]:
        """Remove these adapters' rows from the tables of a bank, and say what they told.

        They stand before the last row, which is the base's.

        Returns:
            The source of each table by its name; nothing at all if one of them is no strided part of one tensor.
        """
        import onnx_ir

        found: dict[str, TableSource | None] = {}
        for held in _tables(model):
            assert held.const_value is not None
            rows, own = held.const_value.numpy(), len(self.adapters)
            places = sum(row.astype(np.int64) * _BASE**place for place, row in enumerate(rows[-1 - own : -1]))
            kept = np.concatenate([rows[: -1 - own], rows[-1:]])
            held.const_value = onnx_ir.tensor(kept, name=held.name)
            held.shape = onnx_ir.Shape(kept.shape)  # what checks the file compares with the table
            found[str(held.name)] = self._source(np.asarray(places))
        sources = {name: source for name, source in found.items() if source is not None}
        return sources if len(sources) == len(found) else {}

    def _source(self, places: np.ndarray) -> TableSource | None:
        """The strided part of one tensor that has these places; None if there is none."""
        first = int(places.flat[0])
        name = next((n for n, start in self._starts.items() if start <= first < start + self._sizes[n]), None)
        if name is None:
            return None
        strides = tuple(
            int(places[tuple(int(axis == other) for other in range(places.ndim))]) - first if size > 1 else 0
            for axis, size in enumerate(places.shape)
        )
        source = TableSource(name, first - self._starts[name], strides)
        own = np.arange(self._starts[name], self._starts[name] + self._sizes[name])
        return source if np.array_equal(source.row(own, places.shape), places) else None


def _tables(model: onnx_ir.Model) -> Sequence[onnx_ir.Value]:
    """The tables that the ids choose from, each once."""
    (ids,) = [value for value in model.graph.inputs if value.name == IDS]
    tables = [use.node.inputs[0] for use in ids.uses() if use.node.op_type == "Gather"]
    return list(dict.fromkeys(table for table in tables if table is not None))
