"""Weights that a body of If, Loop or Scan gives to what stands around it: no vector can follow them there.

If(flag)  then: w_a          MatMul(x, If)      the product reads one weight or the other
          else: w_b
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onelora_compile.exporters.fold.find_weights import PASSED

if TYPE_CHECKING:
    import onnx_ir


def reads_of_bodies(value: onnx_ir.Value, bodies: Mapping[Any, onnx_ir.Node]) -> list[str]:
    """What reads a value, as it is or moved, behind the ops whose bodies give it: for a message.

    Args:
        value: the weight's.
        bodies: as `bodies_of` gives them.
    """
    found = []
    for output in _given(value, bodies):
        node = output.producer()
        assert node is not None
        readers = ", ".join(sorted({_called(use.node) for use in output.uses()}))
        if readers:
            found.append(f"{readers}, behind {_called(node)}, a body of which gives it")
        found += reads_of_bodies(output, bodies)
    return list(dict.fromkeys(found))


def is_returned(value: onnx_ir.Value, bodies: Mapping[Any, onnx_ir.Node]) -> bool:
    """Whether the file returns a value, as it is, moved, or out of a body."""
    here = value.is_graph_output() and not any(value in graph.outputs for graph in bodies)
    return here or any(is_returned(one, bodies) for one in (*_moved(value), *_given(value, bodies)))


def _given(value: onnx_ir.Value, bodies: Mapping[Any, onnx_ir.Node]) -> Iterator[onnx_ir.Value]:
    """The outputs of ops that are this value of one of their bodies."""
    for graph, node in bodies.items():
        first = 1 if node.op_type == "Loop" else 0  # its body says first whether to go on
        for place, output in enumerate(graph.outputs):
            if output is value and first <= place < first + len(node.outputs):
                yield node.outputs[place - first]
    for moved in _moved(value):
        yield from _given(moved, bodies)


def _moved(value: onnx_ir.Value) -> Iterator[onnx_ir.Value]:
    for use in value.uses():
        if use.node.op_type in PASSED and use.idx == 0:
            yield from use.node.outputs


def _called(node: onnx_ir.Node) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else node.op_type
