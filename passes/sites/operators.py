"""What an op of a graph is: by the function that it calls, never by what that function calls itself.

`mylib::linear`, a user's function `linear` and `F.linear` are three ops.  A function counts as PyTorch's if it is one
of those that PyTorch held when this module was imported; an operator by its namespace; a method by its name, on a
tensor.  The arguments of an op are taken by the names that its schema gives them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

_SAME = {"__matmul__": "matmul", "imatmul": "matmul", "__getitem__": "getitem"}
_OPERATORS = ("matmul", "imatmul", "getitem", "setitem")
_HOMES = (torch.nn.functional, torch, torch.linalg, torch._C._nn, torch._C._VariableFunctions, Tensor)


def _functions() -> Iterator[tuple[Any, str]]:
    for home in _HOMES:
        names = vars(home) if inspect.ismodule(home) else dir(home)  # dir of torch has what is imported on demand
        yield from ((value, name) for name in names if inspect.isroutine(value := getattr(home, name)))
    yield from ((getattr(operator, name), name) for name in _OPERATORS)


_NAMES: dict[Any, str] = {}
for _function, _name in _functions():
    _known = _NAMES.setdefault(_function, _name)
    if _known != _name and not hasattr(torch.ops.aten, _known):  # torch.spmm is torch.mm
        _NAMES[_function] = _name
_NAMES |= {_function: _SAME[_name] for _function, _name in _NAMES.items() if _name in _SAME}


def op_name(node: fx.Node) -> str:
    """The name that a function, a method or an operator has in PyTorch.

    `namespace::name` for an operator of another library; "" for a function of anybody else, and for other nodes.

    >>> import torch.nn.functional as F
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> ops = (torch.ops.aten.linear, torch.ops.aten.linear.default, F.linear, lambda x: x)
    >>> [op_name(graph.call_function(op, (x, x))) for op in ops]
    ['linear', 'linear', 'linear', '']
    """
    if node.op == "call_method":
        name = str(node.target)
        return _SAME.get(name, name) if hasattr(Tensor, name) and _on_a_tensor(node) else ""
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.removeprefix("aten::")
    try:
        return _NAMES.get(target, "")
    except TypeError:  # not hashable: nothing of PyTorch's
        return ""


def _on_a_tensor(node: fx.Node) -> bool:
    """Whether what the method is called on may be a tensor, as far as the graph tells."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    value = source.meta.get("example_value", source.meta.get("val"))
    return value is None or isinstance(value, Tensor)


def is_known(function: Any) -> bool:
    """Whether a function is PyTorch's or Python's: what anybody else's does can't be told.

    >>> is_known(torch.relu), is_known(operator.add), is_known(lambda x: x)
    (True, True, False)
    """
    home = getattr(function, "__module__", None) or type(function).__module__
    return str(home).partition(".")[0] in ("torch", "operator", "_operator", "math", "builtins")


def arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of an op by the names of its schema, with the defaults; None where no schema takes them.

    `self` is what functions call `input`.

    >>> graph = fx.Graph()
    >>> c, x, w = (graph.placeholder(name) for name in "cxw")
    >>> arguments(graph.call_method("addmm", (c, x, w), {"alpha": 2}))
    {'self': c, 'mat1': x, 'mat2': w, 'beta': 1, 'alpha': 2}
    """
    target: Any = node.target
    if isinstance(target, FunctionType):
        try:
            bound = inspect.signature(target).bind(*node.args, **node.kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return dict(bound.arguments)
    for overload in _overloads(node):
        if (found := _bind(overload._schema, node.args, node.kwargs)) is not None:
            return found
    return None


def as_operator(node: fx.Node) -> None:
    """Make a function or a method the operator of aten that it is, in place: exported programs hold nothing else."""
    if isinstance(node.target, torch._ops.OpOverload):
        return
    for overload in _overloads(node):
        if (found := _bind(overload._schema, node.args, node.kwargs)) is not None:
            known = overload._schema.arguments
            node.op, node.target = "call_function", overload
            node.args = tuple(found[one.name] for one in known if not one.kwarg_only)
            node.kwargs = {one.name: found[one.name] for one in known if one.kwarg_only}
            return


def _overloads(node: fx.Node) -> Iterator[Any]:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        yield target
        return
    packet = target if isinstance(target, torch._ops.OpOverloadPacket) else None
    if packet is None and (name := op_name(node)) and "::" not in name:
        names = (name, f"linalg_{name}", name.replace("__rmatmul__", "matmul"))
        packet = next((getattr(torch.ops.aten, own) for own in names if hasattr(torch.ops.aten, own)), None)
    if packet is not None:
        for overload in packet.overloads():
            yield getattr(packet, overload)


def _bind(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    known = {one.name: one for one in schema.arguments}
    positional = [one.name for one in schema.arguments if not one.kwarg_only]
    if len(args) > len(positional):
        return None
    given = dict(zip(positional, args, strict=False))
    for name, value in kwargs.items():
        own = "self" if name == "input" and "input" not in known else name
        if own not in known or own in given:
            return None
        given[own] = value
    for name, one in known.items():
        if name not in given:
            if not one.has_default_value():
                return None
            given[name] = one.default_value
        elif _wants_tensor(one) and not isinstance(given[name], (fx.Node, Tensor)):
            return None
        elif "Tensor" not in str(one.type) and _is_tensor(given[name]):
            return None
        elif _is_of_another_type(str(one.type), given[name]):
            return None
    return {name: given[name] for name in known}


def _is_of_another_type(kind: str, value: Any) -> bool:
    """What tells the overloads of aten apart besides their tensors."""
    if kind == "str":  # the name of an axis, before 2.13
        return not isinstance(value, str)
    if kind == "int":
        return isinstance(value, (str, list, tuple))
    return kind == "List[int]" and isinstance(value, str)


def _wants_tensor(argument: Any) -> bool:
    return isinstance(argument.type, torch._C.TensorType)


def _is_tensor(value: Any) -> bool:
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value", value.meta.get("val"))
    return isinstance(value, Tensor) and value.ndim > 0
