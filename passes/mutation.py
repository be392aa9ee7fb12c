"""Which nodes of a graph write to a tensor that exists already.

Dynamo's graphs are not functional: after `x.add_(1)` a later use of the node `x` sees the new values.  A pass that
reads the same node at two places may treat the reads as equal only if nothing wrote in between.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

_IN_PLACE_FUNCTIONS = {operator.setitem} | {
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and f"__{name}__" in dir(operator)
}


def mutates(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node may write to one of its inputs; when it can't be told, it may."""
    if "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    if node.op == "call_method":
        name = str(node.target)
        dunder = name.endswith("__")
        return name == "__setitem__" or name.startswith("__i") if dunder else name.endswith("_")
    if node.op == "call_module":
        called = gm.get_submodule(str(node.target))
        return any(getattr(module, "inplace", False) for module in called.modules()) or isinstance(
            called, fx.GraphModule
        )
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    # F.relu(x, True): in-place as the second positional argument of an activation.
    name = getattr(target, "__name__", "")
    positional = len(node.args) > 1 and node.args[-1] is True
    return target in _IN_PLACE_FUNCTIONS or (name.endswith("_") and not name.endswith("__")) or positional
