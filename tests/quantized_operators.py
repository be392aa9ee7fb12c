"""Small ONNX models around one linear whose op computes with integers itself."""

import numpy as np
from onnx import TensorProto, helper
from quantized_graphs import IN, MS, OUT, ROWS, Built, C, weight_and_input, wrapped
from quantized_storage import Graph, quantized

LOW, HIGH = -128, 127
STEP = np.float32(1 / 64)


def stored(g, weight, out, by_axis, kind="int8"):
    """Names of the stored numbers, scale and zero point, and the exact matrix."""
    axis = out if by_axis else None
    if kind == "uint8" and not by_axis:
        q, scale, zero, exact = quantized(weight, axis, 0, 255, False, np.uint8)
    else:
        q, scale, zero, exact = quantized(weight, axis, -127, 127, True, np.int8)
    if kind == "uint8" and by_axis:  # unsigned numbers around 128: of these ONNX Runtime sums exactly on every CPU
        q, zero = (q.astype(np.int16) + 128).astype(np.uint8), np.full_like(scale, 128, np.uint8)
    return g.hold(q, "q"), g.hold(scale, "s"), g.hold(zero, "z"), exact


def quantized_input(g, how):
    """Names of the quantised input, its scale and its zero point."""
    if how == "dynamic":
        return g.add("DynamicQuantizeLinear", "x", outputs=3)
    zero, scale = g.hold(np.uint8(128), "xz"), g.hold(STEP, "xs")
    if how == "unnamed":  # as of a table of integers: no op says what its scale is
        return g.add("Cast", g.add("Add", g.add("Div", "x", scale), g.hold(np.float32(128))), to=2), scale, zero
    return g.add("QuantizeLinear", "x", scale, zero), scale, zero


def matmul_integer(side, how, by_axis, scales):
    def write(g, weight):
        q, scale, zero, exact = stored(g, weight.T if side else weight, side, by_axis, "uint8")
        if by_axis and not side:
            g.arrays[scale] = g.arrays[scale].reshape(-1, 1)
            g.arrays[zero] = np.uint8(128)
        x, x_scale, x_zero = quantized_input(g, how)
        y = g.add("MatMulInteger", *((x, q, x_zero, zero) if side else (q, x, zero, x_zero)))
        y = g.add("Cast", y, to=TensorProto.FLOAT)
        if scales == ", scales in turn":
            return g.add("Mul", g.add("Mul", y, scale), x_scale), exact.T if side else exact
        if scales == ", divided":
            divisor = g.hold((1 / g.arrays[scale]).astype(np.float32))
            return g.add("Div", g.add("Mul", y, x_scale), divisor), exact.T if side else exact
        return g.add("Mul", y, g.add("Mul", x_scale, scale)), exact.T if side else exact

    return (2, ROWS, IN) if side else (IN, ROWS), write, _product(side)


def _product(side):
    return (lambda w, x: x @ w.T) if side else (lambda w, x: w @ x)


def conv_integer(how, by_axis):
    def write(g, weight):
        q, scale, zero, exact = stored(g, weight[:, :, None, None], 0, by_axis, "uint8")
        if by_axis:
            g.arrays[scale] = g.arrays[scale].reshape(1, -1, 1, 1)
            g.arrays[zero] = np.uint8(128)
        x, x_scale, x_zero = quantized_input(g, how)
        y = g.add("Cast", g.add("ConvInteger", x, q, x_zero, zero, kernel_shape=[1, 1]), to=TensorProto.FLOAT)
        return g.add("Mul", y, g.add("Mul", x_scale, scale)), exact[:, :, 0, 0]

    return (2, IN, 4, 5), write, lambda w, x: np.einsum("oi,bihw->bohw", w, x)


def to_float(side, how):
    def write(g, weight):
        q, scale, zero, exact = stored(g, weight.T if side else weight, side, side == 1, "uint8")
        x, x_scale, x_zero = quantized_input(g, how)
        both = (x, q, x_scale, scale, x_zero, zero) if side else (q, x, scale, x_scale, zero, x_zero)
        return g.add("MatMulIntegerToFloat", *both, domain=MS), exact.T if side else exact

    return (ROWS, IN) if side else (IN, ROWS), write, _product(side)


def dynamic_matmul(by_axis):
    def write(g, weight):
        q, scale, zero, exact = stored(g, weight.T, 1, by_axis, "uint8")
        return g.add("DynamicQuantizeMatMul", "x", q, scale, zero, g.hold(C), domain=MS), exact.T

    return (2, ROWS, IN), write, lambda w, x: x @ w.T + C


def closed(g):
    """Scale and zero point of an output, wide enough for every update of the tests."""
    return g.hold(np.float32(0.5), "ys"), g.hold(np.uint8(120), "yz")


def opened(g, y, scale, zero):
    return g.add("DequantizeLinear", y, scale, zero)


def qlinear_matmul(by_axis, side=1):
    def write(g, weight):
        q, scale, zero, exact = stored(g, weight.T if side else weight, side, by_axis, "uint8")
        out, x = closed(g), quantized_input(g, "static")
        both = (*x, q, scale, zero) if side else (q, scale, zero, *x)
        y = g.add("QLinearMatMul", *both, *out)
        return opened(g, y, *out), exact.T if side else exact

    return (ROWS, IN) if side else (IN, ROWS), write, _product(side)


def qlinear_conv(by_axis):
    def write(g, weight):
        q, scale, zero, exact = stored(g, weight[:, :, None, None], 0, by_axis, "uint8")
        bias = g.hold(np.rint(C / (STEP * g.arrays[scale])).astype(np.int32), "bias")
        out, x = closed(g), quantized_input(g, "static")
        y = g.add("QLinearConv", *x, q, scale, zero, *out, bias, kernel_shape=[1, 1], strides=[1, 2])
        return opened(g, y, *out), exact[:, :, 0, 0]

    return (2, IN, 4, 5), write, lambda w, x: np.einsum("oi,bihw->bohw", w, x[..., ::2]) + C[:, None, None]


def qgemm(by_axis, trans_b, trans_a, floating):
    def write(g, weight):
        q, scale, zero, exact = stored(g, weight if trans_b else weight.T, 1 - trans_b, by_axis, "uint8")
        bias = g.hold(np.rint(C / (STEP * g.arrays[scale])).astype(np.int32), "bias")
        out, x = () if floating else closed(g), quantized_input(g, "static")
        flags = {"transB": trans_b, "transA": trans_a, "alpha": 1.0}
        y = g.add("QGemm", *x, q, scale, zero, bias, *out, domain=MS, **flags)
        return y if floating else opened(g, y, *out), exact if trans_b else exact.T

    return (IN, ROWS) if trans_a else (ROWS, IN), write, lambda w, x: (x.T if trans_a else x) @ w.T + C


def blocks(bits, zero, grouped):
    def write(g, weight):
        size, count, most = 16, IN // 16, 2**bits - 1
        groups = np.random.default_rng(5).permutation(np.arange(IN) // size).astype(np.int32) if grouped else None
        block = groups if grouped else np.arange(IN) // size
        scale = np.full((OUT, count), np.abs(weight).max() * (1.0 if bits == 2 else 2.0) / most, np.float32)
        scale *= np.linspace(0.9, 1.1, scale.size, dtype=np.float32).reshape(scale.shape)
        point = np.full((OUT, count), 2 ** (bits - 1), np.float32)
        if zero:
            point += np.arange(count)
        q = np.clip(np.rint(weight / scale[:, block] + point[:, block]), 0, most).astype(np.uint8)
        exact = (q - point[:, block]) * scale[:, block]
        lined = q.reshape(OUT, count, -1, 8 // bits)
        packed = sum(lined[..., at] << (bits * at) for at in range(8 // bits)).astype(np.uint8)
        names = ["x", g.hold(packed, "q"), g.hold(scale.reshape(-1), "s")]
        if zero == "float":
            names.append(g.hold(point.reshape(-1), "z"))
        elif zero:
            padded = np.zeros((OUT, -(-count * bits // 8) * 8 // bits), np.uint8)
            padded[:, :count] = point
            parts = padded.reshape(OUT, -1, 8 // bits)
            names.append(g.hold(sum(parts[..., at] << (bits * at) for at in range(8 // bits)).astype(np.uint8), "z"))
        elif grouped:
            names.append("")
        if grouped:
            names.append(g.hold(groups, "g"))
        sizes = {"K": IN, "N": OUT, "bits": bits, "block_size": size, "accuracy_level": 1}
        return g.add("MatMulNBits", *names, domain=MS, **sizes), exact.astype(np.float64)

    return (2, ROWS, IN), write, lambda w, x: x @ w.T


OPERATORS = {}
for _how in ("dynamic", "static", "unnamed"):
    for _axis in (False, True):
        _name = f"{_how}{', by axis' * _axis}"
        for _scales in ("", ", scales in turn", ", divided"):
            _label = f"{_name}{_scales}"
            OPERATORS[f"MatMulInteger {_label}"] = matmul_integer(1, _how, _axis, _scales)
            OPERATORS[f"MatMulInteger left {_label}"] = matmul_integer(0, _how, _axis, _scales)
        OPERATORS[f"ConvInteger {_name}"] = conv_integer(_how, _axis)
    OPERATORS[f"MatMulIntegerToFloat {_how}"] = to_float(1, _how)
    OPERATORS[f"MatMulIntegerToFloat left {_how}"] = to_float(0, _how)
for _axis in (False, True):
    _by = " by axis" * _axis
    OPERATORS[f"DynamicQuantizeMatMul{_by}"] = dynamic_matmul(_axis)
    OPERATORS[f"QLinearMatMul{_by}"] = qlinear_matmul(_axis)
    OPERATORS[f"QLinearConv{_by}"] = qlinear_conv(_axis)
    for _b in (0, 1):
        for _floating in (False, True):
            OPERATORS[f"QGemm{_by}{' transB' * _b}{' floating' * _floating}"] = qgemm(_axis, _b, 0, _floating)
OPERATORS["QLinearMatMul left"] = qlinear_matmul(False, 0)
OPERATORS["QGemm transA"] = qgemm(False, 1, 1, False)
for _bits in (4, 8, 2):
    for _zero in {4: ("", "uint8", "float"), 8: ("", "uint8"), 2: ("",)}[_bits]:
        for _grouped in (False, True) if _bits == 4 else (False,):  # no more is there in ONNX Runtime's CPU provider
            OPERATORS[f"MatMulNBits {_bits} {_zero}{' g_idx' * _grouped}"] = blocks(_bits, _zero, _grouped)


def build_operator(name, level, opset):
    """A model with one operator."""
    shape, write, of = OPERATORS[name]
    weight, x = weight_and_input(shape)
    g = Graph(opset)
    y, exact = write(g, weight)
    g.nodes.append(helper.make_node("Identity", [y], ["o"]))
    return Built(wrapped(g, x, level, opset), x, exact, of)
