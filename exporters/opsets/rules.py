"""How single operators go from one opset to the one before, where onnx.version_converter does not know or is wrong.

    18  Reduce…(x, axes)            -> Reduce…(x){axes}
        Split(x){num_outputs}       -> Split(x, sizes)
        Pad, Resize of some axes    -> of all axes
    20  GridSample{linear, cubic}   -> GridSample{bilinear, bicubic}
        Gelu(x)                     -> its definition
    21  GroupNormalization          -> written out: scale and bias were one for each group before
        QuantizeLinear{output_dtype} -> QuantizeLinear(…, zero point of that dtype)
    23  RMSNormalization            -> written out
        DequantizeLinear{output_dtype}, QuantizeLinear of two dtypes  -> with a Cast before

A rule changes a node, or replaces it.  What it can't say, it leaves to the check of the older schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError, require
from onelora_compile.exporters.opsets.one_node import constant_of
from onelora_compile.exporters.opsets.write_out import Before, write_out_gelu, write_out_group_norm, write_out_rms_norm

if TYPE_CHECKING:
    import onnx_ir

_MODES = {"linear": "bilinear", "cubic": "bicubic"}  # of GridSample, before opset 20
_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod SumSquare".split()


def rule_of(op_type: str, opset: int) -> Callable[[onnx_ir.Node], None] | None:
    """How an operator leaves an opset downwards; None if no rule of this project says so."""
    return _RULES.get((op_type, opset))


def _as_it_is(node: onnx_ir.Node) -> None:
    """What changed are its attributes, inputs and types, which are checked for every node."""


def _sizes_as_input(node: onnx_ir.Node) -> None:
    if "num_outputs" not in node.attributes:
        return
    count = node.attributes.pop("num_outputs").as_int()
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    x = node.inputs[0]
    known = x and (constant_of(x) or x)
    size = known.shape[axis] if known is not None and known.shape is not None else None
    if not isinstance(size, int):
        raise ExportError(
            f"Split {node.name!r} divides an axis of unknown size, which opset 17 has no form for: give torch.split "
            "sizes"
        )
    each = -(-size // count)
    sizes = [each] * (count - 1) + [size - each * (count - 1)]
    constant = Before(node).constant(np.array(sizes, np.int64))
    node.resize_inputs(2)
    node.replace_input_with(1, constant)


def _axes_as_attribute(node: onnx_ir.Node) -> None:
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = None if given is None else constant_of(given)
    if given is not None and axes is None:
        raise ExportError(
            f"{node.op_type} {node.name!r} computes its axes, which opset 17 has no form for: make them a constant"
        )
    numbers = [] if axes is None else [int(axis) for axis in axes.numpy().flatten()]
    noop = node.attributes.pop("noop_with_empty_axes").as_int() if "noop_with_empty_axes" in node.attributes else 0
    if noop and not numbers:
        raise ExportError(
            f"{node.op_type} {node.name!r} reduces nothing, which opset 17 has no form for: take it out of the model"
        )
    if numbers:
        ir = require("onnx_ir", "onnx", "lower the opset of a model")
        node.attributes["axes"] = ir.AttrInt64s("axes", numbers)
    node.resize_inputs(1)


def _pad_all_axes(node: onnx_ir.Node) -> None:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        rank, axes = _rank_and_axes(node, constant_of(node.inputs[3]))
        both = [*axes, *(axis + rank for axis in axes)]  # first the pads before, then those after
        node.replace_input_with(1, _scattered(node, np.zeros(2 * rank, np.int64), both, node.inputs[1]))
        node.resize_inputs(3)


def _resize_all_axes(node: onnx_ir.Node) -> None:
    mode = node.attributes.get("coordinate_transformation_mode")
    if "axes" not in node.attributes or (mode is not None and mode.as_string() == "tf_crop_and_resize"):
        return  # where a part is cropped, the axes stay, and are refused
    ir = require("onnx_ir", "onnx", "lower the opset of a model")
    rank, axes = _rank_and_axes(node, ir.tensor(node.attributes["axes"].as_ints()))
    if node.inputs[2] is not None:
        node.replace_input_with(2, _scattered(node, np.ones(rank, np.float32), axes, node.inputs[2]))
    else:
        node.replace_input_with(3, _scattered(node, None, axes, node.inputs[3]))
    node.attributes.pop("axes")


def _scattered(node: onnx_ir.Node, whole: np.ndarray | None, places: list[int], values: Any) -> Any:
    """One number for each axis, from those of some axes: a constant where they are. None is the shape of the input."""
    made, x = Before(node), node.inputs[0]
    if whole is None and x.shape.is_static():  # type: ignore[union-attr]
        whole = np.array(x.shape.numpy(), np.int64)  # type: ignore[union-attr]
    known = constant_of(values)
    if known is not None and whole is not None:
        whole[places] = known.numpy().flatten()
        return made.constant(whole)
    base = made.add("Shape", x) if whole is None else made.constant(whole)
    return made.add("ScatterElements", base, made.constant(np.array(places, np.int64)), values)


def _rank_and_axes(node: onnx_ir.Node, axes: Any) -> tuple[int, list[int]]:
    x = node.inputs[0]
    if x is None or x.shape is None or axes is None:
        raise ExportError(
            f"{node.op_type} {node.name!r} names some axes, which opset 17 has no form for, and they or the rank of "
            "its input are not known: name all of them"
        )
    rank = len(x.shape)
    return rank, [int(axis) % rank for axis in axes.numpy().flatten()]


def _rename_mode(node: onnx_ir.Node) -> None:
    ir = require("onnx_ir", "onnx", "lower the opset of a model")
    x = node.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 4:
        raise ExportError(
            f"GridSample {node.name!r} samples a volume, or something of unknown rank, which opset 19 has no form for"
        )
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "linear"
    node.attributes["mode"] = ir.AttrString("mode", _MODES.get(mode, mode))


def _zero_point_says_dtype(node: onnx_ir.Node) -> None:
    """The quantised dtype is that of a zero point."""
    wanted = node.attributes.pop("output_dtype").as_int() if "output_dtype" in node.attributes else 0
    if not wanted or (len(node.inputs) > 2 and node.inputs[2] is not None):
        return
    scale = node.inputs[1]
    if scale is None or scale.shape is None or not scale.shape.is_static():
        raise ExportError(
            f"QuantizeLinear {node.name!r} has no zero point, which opset 20 knows its dtype from, and the shape that "
            "it would have is not known: quantise with zero points"
        )
    made = Before(node)
    zero = made.constant(np.zeros(scale.shape.numpy(), made.ir.DataType(wanted).numpy()))
    node.resize_inputs(3)
    node.replace_input_with(2, zero)


def _one_dtype(node: onnx_ir.Node) -> None:
    """The dtype of the scale is that of what is quantised: the division was in it already."""
    x, scale = node.inputs[:2]
    if x is not None and scale is not None and None not in (x.dtype, scale.dtype):
        node.replace_input_with(0, Before(node).cast(x, scale.dtype))


def _scale_says_dtype(node: onnx_ir.Node) -> None:
    """What is dequantised has the dtype of the scale, and is multiplied in it."""
    wanted = node.attributes.pop("output_dtype").as_int() if "output_dtype" in node.attributes else 0
    if wanted and node.inputs[1] is not None:
        made = Before(node)
        node.replace_input_with(1, made.cast(node.inputs[1], made.ir.DataType(wanted)))


_RULES: dict[tuple[str, int], Callable[[onnx_ir.Node], None]] = {
    **{(f"Reduce{name}", 18): _axes_as_attribute for name in _REDUCTIONS},
    ("LpPool", 18): _as_it_is,
    ("Pad", 18): _pad_all_axes,
    ("Resize", 18): _resize_all_axes,
    ("Split", 18): _sizes_as_input,
    ("ConstantOfShape", 20): _as_it_is,
    ("Gelu", 20): write_out_gelu,
    ("GridSample", 20): _rename_mode,
    ("GroupNormalization", 21): write_out_group_norm,
    ("QuantizeLinear", 21): _zero_point_says_dtype,
    ("GlobalMaxPool", 22): _as_it_is,
    ("DequantizeLinear", 23): _scale_says_dtype,
    ("QuantizeLinear", 23): _one_dtype,
    ("RMSNormalization", 23): write_out_rms_norm,
    # Bodies are nodes of the model, and each goes its own way; a constant may be a weight, which nobody need copy.
    **{(name, opset): _as_it_is for name in ("If", "Loop", "Scan", "Constant") for opset in range(18, 29)},
}
