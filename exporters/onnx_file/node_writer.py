"""Writes new nodes and constants into the graphs of an ONNX model, in its opset and under names that are free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import require

if TYPE_CHECKING:
    import onnx_ir


class Writer:
    """Adds nodes behind others; a name is never that of another value, in no graph of the model."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self.ir: Any = require("onnx_ir", "onnx", "change an ONNX model")
        self.opset = model.opset_imports.get("") or 18
        self.names: set[str] = set()
        for graph in [model.graph, *model.graph.subgraphs()]:
            self.names |= {value.name or "" for value in graph.inputs} | set(graph.initializers)
            for node in graph:
                self.names |= {node.name or "", *(value.name or "" for value in node.outputs)}

    def name(self, wanted: str) -> str:
        """The name, or with a number behind it where it is taken."""
        name, number = wanted, 0
        while name in self.names:
            number += 1
            name = f"{wanted}.{number}"
        self.names.add(name)
        return name

    def add(
        self,
        after: onnx_ir.Node | onnx_ir.Graph,
        op_type: str,
        *inputs: onnx_ir.Value | None,
        dtype: onnx_ir.DataType | None = None,
        domain: str = "",
        name: str = "",
        **attributes: Any,
    ) -> onnx_ir.Value:
        """The output of a new node behind a node, or at the beginning of a graph."""
        label = self.name(name or f"onelora_{op_type}")
        value: onnx_ir.Value = self.ir.val(self.name(f"{label}_out"), dtype)
        node = self.ir.node(op_type, inputs, attributes, domain=domain, name=label, outputs=[value])
        if isinstance(after, self.ir.Graph) and len(after):
            after[0].prepend(node)
        else:
            after.append(node)
        return value

    def behind(self, value: onnx_ir.Value, graph: onnx_ir.Graph) -> onnx_ir.Node | onnx_ir.Graph:
        """Where in a graph a value is there: behind its node, or from the beginning if it comes from outside."""
        node = value.producer()
        return node if node is not None and node.graph is graph else graph

    def made(self, value: onnx_ir.Value) -> onnx_ir.Node:
        """The node that makes a value."""
        node = value.producer()
        assert node is not None
        return node

    def constant(self, graph: onnx_ir.Graph, numbers: np.ndarray, name: str) -> onnx_ir.Value:
        """A new initializer of a graph."""
        name = self.name(name)
        value: onnx_ir.Value = self.ir.val(name, const_value=self.ir.tensor(numbers, name=name))
        graph.register_initializer(value)
        return value

    def last_axis_sum(self, after: onnx_ir.Node | onnx_ir.Graph, x: onnx_ir.Value) -> onnx_ir.Value:
        """The sum over the last axis, which stays with one entry; its axes are an input since opset 13."""
        if self.opset < 13:
            return self.add(after, "ReduceSum", x, dtype=x.dtype, axes=[-1], keepdims=1)
        graph = after.graph if isinstance(after, self.ir.Node) else after
        axes = self.constant(graph, np.array([-1], np.int64), "onelora_last_axis")  # type: ignore[arg-type]
        return self.add(after, "ReduceSum", x, axes, dtype=x.dtype, keepdims=1)

    def replace(self, old: onnx_ir.Value, new: onnx_ir.Value) -> None:
        """Let all readers of a value read another one, which takes its name where it is an output of a graph.

        The node that made `new` may read `old` and goes on to do so.
        """
        maker = new.producer()
        own = [use.idx for use in old.uses() if use.node is maker]
        if old.is_graph_output():
            new.name, old.name = old.name, self.name(f"{old.name}_inner")
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        for place in own:
            self.made(new).replace_input_with(place, old)
