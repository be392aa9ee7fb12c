"""Wider ranges for static quantisers: a new scale and zero point for a QuantizeLinear and all that reads it.

Biases that are integers in units of the old scale of their input, as runtimes read them, are brought into the new one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError
from onelora_compile.exporters.onnx_file.constants import Constants
from onelora_compile.exporters.onnx_file.node_writer import Writer
from onelora_compile.exporters.quantized.quantizers import limits, quantized_dtype
from onelora_compile.exporters.quantized.saturation import Quantizer

if TYPE_CHECKING:
    import onnx_ir


def needed(quantizer: Quantizer, seen: np.ndarray, plain: np.ndarray) -> tuple[float, float] | None:
    """The range that a quantiser needs, None where its own is enough.

    A range that begins (or ends) at zero stands for a Relu before it, which quantisers leave out, and one up to 6 for a
    Relu6: these ends stay.

    Args:
        quantizer: one with a range.
        seen: the smallest and largest value with the vectors.
        plain: the same with zero vectors.

    Raises:
        ExportError: it can't be told whether a range stands for a Relu.
    """
    held = quantizer.held
    assert held is not None
    low, high = min(held.low, float(seen[0])), max(held.high, float(seen[1]))
    for side, value, base in (("low", seen[0], plain[0]), ("high", -seen[1], -plain[1])):
        if held.clips != side:
            continue
        if value < -held.step and base >= -held.step / 2:
            raise ExportError(
                f"the range of {quantizer.name!r} ends at zero, the base stays on one side of it on the calibration "
                "inputs and the vectors lead beyond: whether a Relu was left out there can't be told. Quantise the "
                "base with a symmetric range for it, or fold before quantising"
            )
        low, high = (0.0, high) if side == "low" else (low, 0.0)
    if held.clips == "low" and abs(held.high - 6) <= held.step and plain[1] > 6:
        high = held.high
    return (low, high) if low < held.low - held.step / 2 or high > held.high + held.step / 2 else None


def widen(quantizer: Quantizer, low: float, high: float, writer: Writer, constants: Constants) -> None:
    """Give a quantiser and its readers a range."""
    node, held = quantizer.node, quantizer.held
    assert held is not None
    graph: Any = node.graph
    scale, zero = node.inputs[1], (node.inputs[2] if len(node.inputs) > 2 else None)
    assert scale is not None
    dtype = quantized_dtype(node, constants)
    least, most = limits(dtype)
    old = constants.numbers(scale)
    point = 0.0 if zero is None else float(constants.numbers(zero).astype(np.float64).reshape(()))
    if dtype.is_floating_point() or (point == 0 and least < 0) or point in (128, 32768):  # symmetric
        ends = ((low, least - point), (high, most - point))
        step = max(value / end for value, end in ends)
    else:
        step = (high - low) / (most - least)
        point = float(np.clip(np.rint(least - low / step), least, most))
    label = f"{quantizer.name}_wider"
    new = writer.constant(graph, np.asarray(step, old.dtype).reshape(old.shape), f"{label}_scale")
    kept = [new]
    if zero is not None:
        old_zero = constants.numbers(zero)
        numbers = np.asarray(point).astype(old_zero.dtype).reshape(old_zero.shape)
        kept.append(writer.constant(graph, numbers, f"{label}_zero_point"))
    for one in (node, *quantizer.readers):
        for place, value in enumerate(kept, 1):
            one.replace_input_with(place, value)
    for reader in quantizer.readers:
        for use in list(reader.outputs[0].uses()):
            if use.node.op_type in ("Conv", "Gemm") and use.idx == 0:
                _rescale_bias(use.node, float(step), writer, constants)


def _rescale_bias(node: onnx_ir.Node, step: float, writer: Writer, constants: Constants) -> None:
    """Bring an integer bias into units of the new scale of the input and that of the weight, as runtimes read it."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    weight = node.inputs[1]
    makers = [None if one is None else one.producer() for one in (weight, bias)]
    if any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers):
        return
    weight_maker, bias_maker = makers
    assert bias is not None and weight_maker is not None and bias_maker is not None  # noqa: PT018
    stored = bias_maker.inputs[0]
    if (
        not constants.known(bias)
        or not constants.known(weight)
        or stored is None
        or constants.numbers(stored).dtype != np.int32
    ):
        return
    scale = constants.numbers(weight_maker.inputs[1]) * np.float32(step)  # type: ignore[arg-type]
    scale = scale.reshape(constants.shape(bias_maker.inputs[1])) if scale.size == 1 else scale  # type: ignore[arg-type]
    numbers = np.rint(constants.numbers(bias).astype(np.float64) / scale).astype(np.int32)
    graph = node.graph
    held = [
        writer.constant(graph, numbers, f"{stored.name}_rescaled"),  # type: ignore[arg-type]
        writer.constant(graph, np.asarray(scale, np.float32), f"{stored.name}_rescaled_scale"),  # type: ignore[arg-type]
    ]
    attributes = {name: one.value for name, one in bias_maker.attributes.items()}
    new = writer.add(bias_maker, "DequantizeLinear", *held, dtype=bias.dtype, domain=bias_maker.domain, **attributes)
    node.replace_input_with(2, new)
