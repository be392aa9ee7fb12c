"""Which values of a file are one value: computed by the same operators from the same inputs.

A file without common subexpressions taken out computes the time embedding of a DiT twice.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from onelora_compile.exporters.onnx_file.constants import DOMAINS

if TYPE_CHECKING:
    import onnx_ir

_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")
_SMALL = 64  # numbers of a constant that are compared; larger ones are compared as objects


class SameValues:
    """Numbers values, equal ones equally; an initializer is equal to itself alone."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[onnx_ir.Value, int] = {}

    def number(self, value: onnx_ir.Value) -> int:
        """The number of a value; of equal ones the same."""
        left = [value]
        while left:
            node = left[-1].producer()
            before = [one for one in (node.inputs if node else ()) if one is not None and one not in self._known]
            if before:
                left += before
            else:
                one = left.pop()
                self._known[one] = self._numbers.setdefault(self._key(one, node), len(self._numbers))
        return self._known[value]

    def _key(self, value: onnx_ir.Value, node: onnx_ir.Node | None) -> Hashable:
        if node is None or node.domain not in DOMAINS or any(word in node.op_type for word in _RANDOM):
            return id(value)
        inputs = tuple(None if one is None else self._known[one] for one in node.inputs)
        attributes = tuple(sorted((name, _shown(one)) for name, one in node.attributes.items()))
        return node.domain, node.op_type, attributes, inputs, value.index()


def _shown(attribute: onnx_ir.Attr) -> str:
    """A text that tells the attribute from others."""
    value: Any = attribute.value
    if hasattr(value, "numpy") and value.size <= _SMALL:
        return f"{value.dtype} {list(value.shape)} {value.numpy().tobytes().hex()}"
    listed = value if isinstance(value, tuple | list) else (value,)
    return repr(value) if all(isinstance(one, str | int | float) for one in listed) else f"object {id(value)}"
