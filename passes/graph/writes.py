"""Which nodes of a graph write to a tensor that exists already.

Dynamo's graphs are not functional: after `x.add_(1)` a later use of the node `x` sees the new values.  A pass that
reads the same node at two places may treat the reads as equal only if nothing wrote in between.
"""

from __future__ import annotations

import operator
from types import FunctionType
from typing import Any

import torch
from torch import fx

from onelora_compile.passes.sites.operators import arguments, is_known, op_name

_IN_PLACE_FUNCTIONS = {operator.setitem, setattr} | {
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
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _writes(target)
    if isinstance(target, torch._ops.HigherOrderOperator) or target in _IN_PLACE_FUNCTIONS or not is_known(target):
        return True
    # F.relu(x, True): in-place as the second positional argument of an activation.
    given = arguments(node) if isinstance(target, FunctionType) else {}
    name = target.__name__
    return given is None or bool(given.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def written(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What a known op writes into; None for one that gives a new value, and for what nobody knows."""
    known = node.op == "call_method" or (node.op == "call_function" and (op_name(node) or is_known(node.target)))
    if not known or not mutates(gm, node):
        return None
    into = node.kwargs.get("out", node.args[0] if node.args else None)
    return into if isinstance(into, fx.Node) else None


def _writes(packet: torch._ops.OpOverloadPacket) -> bool:
    name = str(packet._qualified_op_name)
    if name.startswith("aten::"):  # its overloads with `out=` are told by that argument
        return name.endswith("_")
    return any(getattr(packet, overload)._schema.is_mutable for overload in packet.overloads())
