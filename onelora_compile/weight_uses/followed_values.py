"""What followed code gets to see of a value, and of a parameter that it did not read as an attribute."""

from __future__ import annotations

import dis
import functools
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.overrides import TorchFunctionMode

from onelora_compile.passes.sites.other_uses import asks_for_no_value

if TYPE_CHECKING:
    from onelora_compile.weight_uses.tracer import Tracer

# What is asked of a tensor as an object, or as a number that code goes by.
_OF_THE_OBJECT = {
    *("__hash__", "__repr__", "__str__", "__format__", "__dir__", "__len__", "__deepcopy__", "__reduce_ex__"),
    *("__bool__", "__int__", "__float__", "__index__", "__array__", "item", "tolist", "numpy"),
}


class Value(fx.Proxy):
    """A value of which code may ask more than a graph can hold: its length, or a number. Both are guessed."""

    def __getattr__(self, k: str) -> Any:
        node = self.__dict__.get("node")
        parameter = self.tracer.parameters.get(node.target) if node is not None else None  # type: ignore[attr-defined]
        if parameter is not None:
            getattr(parameter, k)  # an AttributeError as of the parameter
        return _Attribute(self, k)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})
        elif name not in ("grad", "requires_grad"):
            object.__setattr__(self, name, value)

    def __iter__(self) -> Iterator[fx.Proxy]:
        frame = sys._getframe(1)
        count = _unpacked(frame.f_code).get(frame.f_lasti)  # as of fx.Proxy, which takes the code apart each time
        parts: Any = self
        return self.tracer.iter(self) if count is None else iter([parts[i] for i in range(count)])

    def __len__(self) -> int:
        return self.tracer.length(self)  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return self.tracer.guess()  # type: ignore[attr-defined]

    def __int__(self) -> int:
        return self.tracer.guess()  # type: ignore[attr-defined]

    def __float__(self) -> float:
        return self.tracer.number()  # type: ignore[attr-defined]


@functools.lru_cache(1000)
def _unpacked(code: types.CodeType) -> dict[int, int]:
    """Into how many names code takes something apart, by the place in it."""
    return {one.offset: one.argval for one in dis.get_instructions(code) if one.opname == "UNPACK_SEQUENCE"}


class _Attribute(fx.proxy.Attribute, Value):
    """An attribute, or a method, of a value."""


class Uses(TorchFunctionMode):
    """A parameter that the code comes by without an attribute stands in the graph too, where an op gets it."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch; with nodes in the place of parameters, where it gets some."""
        kwargs = kwargs or {}
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in _OF_THE_OBJECT or asks_for_no_value(name):
            return func(*args, **kwargs)
        nodes: list[Any] = []  # torch.zeros(n) is not asked about n by itself
        given: Any = fx.node.map_aggregate((args, kwargs), lambda one: self._tracer.as_node(one, nodes))
        if not nodes:
            return func(*args, **kwargs)
        if func.__name__ == "__get__":
            return getattr(given[0][0], name)
        if func.__name__ == "__set__":  # p.requires_grad = False: what is followed changes nothing
            return setattr(given[0][0], name, given[0][1])
        return fx.Proxy.__torch_function__(func, types, *given)


def any_of(values: Any, which: Callable[[Any], bool]) -> bool:
    """Whether something in nested containers is one that is looked for."""
    found: list[bool] = []
    fx.node.map_aggregate(values, lambda one: found.append(which(one)))
    return any(found)


def is_code(value: Any) -> bool:
    """Whether a function can call it, or read its weights: nothing but what gets it tells how."""
    return callable(value) and not isinstance(value, (fx.Proxy, type, types.BuiltinFunctionType))
