"""Initializers that a file lists as inputs too: a call may give other numbers for them.

From IR version 4 on.  Before it every initializer is listed, and none can be given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

FIRST = 4  # IR version in which an initializer need not be an input, and one that is can be given


def overridable(model: onnx_ir.Model) -> set[str]:
    """Names of the initializers that a call may give other numbers for."""
    if model.ir_version < FIRST:
        return set()
    return {str(value.name) for value in model.graph.inputs if value.is_initializer()}


def fix(value: onnx_ir.Value, seen: set[onnx_ir.Value] | None = None) -> None:
    """Let no call give other numbers for a constant, nor for what it is computed from.

    What a tool writes of the numbers that a file holds does not follow those of a call.  A runtime refuses a name that
    is no input, and takes one without a word that nothing reads.
    """
    seen = set() if seen is None else seen
    if value in seen:
        return
    seen.add(value)
    if value.is_graph_input() and value.is_initializer() and value.graph is not None:
        value.graph.inputs.remove(value)
    node = value.producer()
    for one in node.inputs if node is not None else ():
        if one is not None:
            fix(one, seen)
