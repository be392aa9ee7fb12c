"""The modes of an ONNX model: what stands in the place of a vector.

    load     an initializer in a file of its own, added to the weight: the runtime folds the sum when it loads the model
    input    an input of the graph with a default value: an adapter for a call
    bank     a row of a table [adapters + 1, out_features], chosen by the input `adapter_ids` [batch]: an adapter for
             each row of the batch; the last row is zero, so that id -1 is the base

What was trained as it is, heads and norms (modules_to_save, train_norms), takes the same places: an initializer, an
input, a table whose last row holds the base's values (bank_trained.py).

Mode "fold" has no vectors: they are in the weights (passes/exported/fold_vectors.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError, require
from onelora_compile.exporters.jetson.device.core.modes import IDS, Mode
from onelora_compile.exporters.to_onnx.bank_trained import TrainedRows
from onelora_compile.exporters.to_onnx.operators import DOMAIN, OperatorWriter

if TYPE_CHECKING:
    import onnx_ir


Vectors = Mapping[str, np.ndarray]


def place_vectors(
    model: onnx_ir.Model,
    mode: Mode,
    vectors: Vectors,
    bank: Sequence[Vectors] = (),
    part: str = "",
    bases: Vectors | None = None,
) -> list[str]:
    """Replace the project's operators in a converted model, in place.

    Args:
        model: holds `onelora::` operators; standard ones only afterwards.
        mode: where the vectors are.
        vectors: float32 values of the modes "load" and "input"; for "bank" their shapes count.
        bank: for mode "bank": the vectors of each adapter.
        part: of the exported model, which the names of vectors are relative to.
        bases: of those that replace a base value as a whole, that value; a bank's last row is made of them.

    Returns:
        The names of the vectors that the model uses.

    Raises:
        ExportError: a bank with a vector that can't be chosen by row, which the message names.
    """
    writer = OperatorWriter(model.graph)
    marks = [node for node in model.graph.all_nodes() if node.domain == DOMAIN and node.op_type == "Vector"]
    for node in marks:
        if part:
            node.attributes.add(writer.ir.AttrString("name", _name(node).removeprefix(f"{part}.")))
    names = list(dict.fromkeys(_name(node) for node in marks))
    if mode.feeds_ids:
        _Bank(writer, vectors, bank, bases or {}).place(marks)
    else:
        for name in names:
            _rename(model.graph, name)
            value = writer.initializer(name, writer.ir.tensor(np.ascontiguousarray(vectors[name]), name=name))
            if mode.feeds_vectors:
                model.graph.inputs.append(value)
            for node in marks:
                if _name(node) == name:
                    node.outputs[0].replace_all_uses_with(_as_used(writer, node, value))
    writer.finish()
    # The marks, what was between them and a table, and the parameters below them.
    passes = require("onnx_ir.passes.common", "onnx", "export to ONNX")
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)  # a new node's output may be called val_0, and so may a vector
    model.opset_imports.pop(DOMAIN, None)
    return names


def _as_used(writer: OperatorWriter, mark: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value:
    """A head or a norm of a half-precision model in its dtype; vectors are read in float32, and cast where needed."""
    dtype = mark.outputs[0].dtype
    readers = {use.node.domain for use in mark.outputs[0].uses()}
    return value if dtype is None or readers == {DOMAIN} else writer.cast(mark, value, dtype)


def _name(node: onnx_ir.Node) -> str:
    return str(node.attributes["name"].as_string())


def _rename(graph: onnx_ir.Graph, name: str) -> None:
    """Give a value that has the name of a vector another one: a parameter that is read has the name of its vector."""
    computed = [value for node in graph.all_nodes() for value in node.outputs]
    for value in [*computed, *graph.initializers.values(), *graph.inputs]:
        if value.name == name:
            value.name = f"{name}.base"


class _Bank:
    """The tables of a bank: one for each update, since what an update reads may be a part of a vector."""

    def __init__(self, writer: OperatorWriter, known: Vectors, bank: Sequence[Vectors], bases: Vectors) -> None:
        self.writer = writer
        self.ir = writer.ir
        self.graph = writer.graph
        self.known = known
        self.bank = bank
        self.bases = bases
        self.gathered: dict[onnx_ir.Value, onnx_ir.Value] = {}

    def place(self, marks: Sequence[onnx_ir.Node]) -> None:
        first = next((value for value in self.graph.inputs if value.shape is not None and len(value.shape) > 0), None)
        if first is None or first.shape is None:
            raise ExportError("a bank needs a first input with a batch axis, which chooses the rows of adapter_ids")
        self.batch = first.shape[0]
        int64 = self.ir.TensorType(self.ir.DataType.INT64)
        _rename(self.graph, IDS)  # as an argument of the model may be called, too
        ids = self.ir.Value(name=IDS, shape=self.ir.Shape([self.batch]), type=int64)
        self.graph.inputs.append(ids)
        whole = [(node.outputs[0], _name(node)) for node in marks if _name(node) in self.bases]
        self.vectors = {node.outputs[0]: _name(node) for node in marks}
        for node in list(self.graph.all_nodes()):
            if node.domain != DOMAIN:
                continue
            if node.op_type == "AdaptedWeight":
                name = self._source(node.inputs[1])
                raise ExportError(
                    f"{name!r} is used as a whole weight, which has no row for each adapter: leave it out"
                )
            if node.op_type == "AddRank1":
                self._update(node, ids)
        TrainedRows(self.writer, ids, self._batch_axis, self._numbers).place(whole)

    def _update(self, node: onnx_ir.Node, ids: onnx_ir.Value) -> None:
        y, _, vector = node.inputs
        assert y is not None
        assert vector is not None
        name = self._source(vector)
        if y.shape is None or vector.shape is None or node.graph is not self.graph:
            raise ExportError(f"{name!r} has no known shape, or is in a subgraph: a bank can't choose its rows")
        rank, axis = len(y.shape), self._batch_axis(y, name)
        if vector not in self.gathered:
            table = self._table(vector, name)
            self.gathered[vector] = self.writer.add(node, "Gather", table, ids, axis=0)  # [batch, *vector]
        rows = self.gathered[vector]
        missing = [position for position in range(rank) if position != axis and position < rank - len(vector.shape)]
        if len(vector.shape) != 1:
            raise ExportError(
                f"{name!r}: a bank can't choose rows for experts, or for a weight on the left: leave it out"
            )
        if missing:
            rows = self.writer.add(node, "Unsqueeze", rows, self.writer.constant(*missing))
        rows.dtype = self.ir.DataType.FLOAT
        node.replace_input_with(2, rows)

    def _batch_axis(self, y: onnx_ir.Value, name: str) -> int:
        assert y.shape is not None
        fitting = [axis for axis, size in enumerate(list(y.shape)[:-1]) if size == self.batch]
        if len(fitting) == 1 or (fitting and self.batch == 1):  # axes of one row are all the same
            return fitting[0]
        found = f"{len(fitting)} axes" if fitting else "no axis"
        raise ExportError(
            f"{name!r}: its output {list(y.shape)} has {found} of the batch size {self.batch}, so its rows can't "
            "be told from each other; leave it out, or export with a batch size of its own (dynamic, or no other axis' "
            "size)"
        )

    def _table(self, vector: onnx_ir.Value, name: str) -> onnx_ir.Value:
        """[adapters + 1, *vector] of what an update reads, the last row zero."""
        own, taken = name, {*self.graph.initializers, IDS}
        while own in taken:
            own += "_"
        _rename(self.graph, own)  # torch.onnx calls what a linear gives "linear", as the linear may be called
        return self.writer.initializer(own, self.ir.tensor(self._numbers(vector, name), name=own))

    def _numbers(self, vector: onnx_ir.Value, name: str) -> np.ndarray:
        """For each adapter what a value is that is made of a vector, the base's last; float32."""
        inside = [node for node in _ancestors(vector) if node.outputs[0] not in self.vectors]
        zeros = np.zeros_like(self.known[name])  # of an adapter that leaves this linear out, and of the base
        base = self.bases.get(name, zeros)
        rows = [self._part(vector, inside, values.get(name, base)) for values in (*self.bank, {})]
        return np.stack(rows).astype(np.float32)

    def _part(self, vector: onnx_ir.Value, inside: list[onnx_ir.Node], whole: np.ndarray) -> np.ndarray:
        """The part of a vector that an update reads: the nodes between, computed now."""
        if not inside:
            return whole
        onnx = require("onnx", "onnx", "export to ONNX")
        reference = require("onnx.reference", "onnx", "export to ONNX")
        source = next(value for value in self.vectors if any(value in node.inputs for node in inside))
        constants = {
            v.name: v.const_value for n in inside for v in n.inputs if v is not None and v.const_value is not None
        }
        graph = onnx.helper.make_graph(
            [self.ir.to_proto(node) for node in inside],
            "part",
            [onnx.helper.make_tensor_value_info(source.name, onnx.TensorProto.FLOAT, list(whole.shape))],
            [onnx.helper.make_tensor_value_info(vector.name, onnx.TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
        part: np.ndarray = reference.ReferenceEvaluator(model).run(None, {source.name: whole})[0]
        return part

    def _source(self, value: onnx_ir.Value | None) -> str:
        """The name of the vector that a value is made of."""
        for node in [*_ancestors(value)]:
            if node.outputs[0] in self.vectors:
                return self.vectors[node.outputs[0]]
        return "a vector"


def _ancestors(value: onnx_ir.Value | None) -> list[onnx_ir.Node]:
    """The nodes that a value is computed by, in order."""
    found: dict[Any, None] = {}

    def visit(one: onnx_ir.Value | None) -> None:
        node = one.producer() if one is not None else None
        if node is None or node in found:
            return
        for before in node.inputs:
            visit(before)
        found[node] = None

    visit(value)
    return list(found)
