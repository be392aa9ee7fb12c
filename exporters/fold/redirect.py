"""Give some uses of a weight one of their own, and remove what nothing reads any more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from onelora_compile.exporters.fold.find_weights import WeightUse
from onelora_compile.exporters.onnx_file.node_writer import Writer

if TYPE_CHECKING:
    import onnx_ir


def redirect(writer: Writer, graph: onnx_ir.Graph, uses: Sequence[WeightUse], tensor: Any) -> None:
    """Let uses of a weight read a tensor, a new initializer of the main graph, by ways of their own."""
    ir = writer.ir
    own = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[tensor.name] = own
    for use in uses:
        before, old = own, use.op.inputs[use.position]
        for node, following in pairwise(use.nodes):
            outputs = len(node.outputs)
            copy = ir.node(
                node.op_type, [before, *node.inputs[1:]], node.attributes, domain=node.domain, num_outputs=outputs
            )
            assert node.graph is not None
            node.graph.insert_before(node, copy)
            copy.name = writer.name(f"{node.name or node.op_type}.folded")
            for one, other in zip(node.outputs, copy.outputs, strict=True):
                other.name = writer.name(f"{one.name}.folded")
                other.shape = one.shape
                if one.dtype is not None:  # foreign models need not say it
                    other.dtype = one.dtype
            taken = next(number for number, one in enumerate(node.outputs) if one in following.inputs)
            before = copy.outputs[taken]
        use.op.replace_input_with(use.position, before)
        remove_unread(old)


def remove_unread(value: onnx_ir.Value | None) -> None:
    """Remove a constant that nothing reads, and then what only it was made of."""
    if value is None or value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        if value.graph is not None and value.is_initializer() and not value.is_graph_input():
            value.graph.initializers.pop(value.name or "", None)
        return
    if node.graph is None or any(one.uses() or one.is_graph_output() for one in node.outputs):
        return
    before = list(node.inputs)
    node.graph.remove(node, safe=True)
    for one in before:
        remove_unread(one)
