"""The scales of an integer product that are multiplied later, behind a Cast.

    y = Cast(MatMulInteger(q, w)) * (s_x * s_w)      in any order, as several multiplications or divisions

Whose the factors are is known where an op quantises q: it names s_x.  What looks q up in a table of integers (a
quantised embedding) names none; then every factor is put into the matrix, which is s_x times the base's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onelora_compile.exporters.onnx_file.constants import Constants

if TYPE_CHECKING:
    import onnx_ir

# What keeps the scale and the zero point of its first input.
_KEEPS = {
    "Gather",
    "GatherND",
    "GatherElements",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Split",
    "Identity",
    "MaxPool",
}
_NEAR = 0.05  # by how much quantising a weight can move a factor that is taken from its numbers


@dataclasses.dataclass(frozen=True)
class Later:
    """The scales behind an integer product.

    Attributes:
        y: where the product is in floating point.
        factors: constants that make its numbers the matrix.
        scale: the scale of the input; None where it is in the factors.
        multiples: what of the factors it may be then.
    """

    y: onnx_ir.Value
    factors: list[np.ndarray]
    scale: onnx_ir.Value | None
    multiples: tuple[float, ...] = ()


def later_scales(node: onnx_ir.Node, constants: Constants) -> Later | None:
    """Where the product of an integer op is in floating point, and the constant factors that make it so.

    It is behind a Cast and multiplications with the scales of the input and of the weight, in any order; a factor that
    is a multiple of the weight's scale makes the matrix that multiple.  None where there is no such place.
    """
    own = scale_of(node.inputs[0 if constants.known(node.inputs[1]) else 1])
    y = _only_user(node.outputs[0], "Cast")
    factors: list[np.ndarray] = []
    found = seen = False
    while y is not None and (following := _only_user(y, "Mul", "Div")) is not None:
        scaling = following.producer()
        assert scaling is not None
        divides = scaling.op_type == "Div"
        leaves = list(_factors(next((one for one in scaling.inputs if one is not y), None)))
        if divides and (scaling.inputs[0] is not y or any(leaf is own for leaf in leaves)):
            break
        if not all((leaf is not None and leaf is own) or constants.known(leaf) for leaf in leaves):
            break
        y, found = following, True
        seen = seen or (own is not None and any(leaf is own for leaf in leaves))
        numbers = [constants.numbers(leaf) for leaf in leaves if leaf is not None and leaf is not own]
        factors += [1 / one for one in numbers] if divides else numbers
    if y is None or not found:
        return None
    if own is None:
        return Later(y, factors, None, tuple(float(one.reshape(())) for one in factors if one.size == 1))
    if constants.known(own) and not seen and factors:
        factors.append(1 / constants.numbers(own))  # a constant scale of the input, multiplied into another one
        seen = True
    return Later(y, factors, own) if seen else None


def scale_of(q: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """The scale of a quantised value, by the op that quantises it; None where none does."""
    maker = q.producer() if q is not None else None
    while maker is not None and maker.op_type in _KEEPS and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    if maker is None or maker.op_type not in ("DynamicQuantizeLinear", "QuantizeLinear"):
        return None
    return maker.outputs[1] if maker.op_type == "DynamicQuantizeLinear" else maker.inputs[1]


def as_stored(factor: float, multiples: Sequence[float]) -> float:
    """A factor that the numbers of a quantised weight tell, as the file holds it exactly, if it does."""
    nearest = min(multiples, key=lambda one: abs(one - factor), default=factor)
    return nearest if abs(nearest - factor) <= _NEAR * abs(factor) else factor


def _only_user(value: onnx_ir.Value, *op_types: str) -> onnx_ir.Value | None:
    users = [use.node for use in value.uses()]
    return users[0].outputs[0] if len(users) == 1 and users[0].op_type in op_types else None


def _factors(value: onnx_ir.Value | None) -> Iterator[onnx_ir.Value | None]:
    """What a product of scales is made of."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Mul":
        for one in node.inputs:
            yield from _factors(one)
    elif node is not None and node.op_type in ("Unsqueeze", "Reshape", "Identity"):
        yield from _factors(node.inputs[0])
    else:
        yield value
