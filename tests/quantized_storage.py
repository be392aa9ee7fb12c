"""The ways that tools store one quantised weight, each with the matrix that it is, in float64."""

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper


class Graph:
    """Nodes and initializers of one graph."""

    def __init__(self, opset):
        self.nodes, self.arrays, self.opset, self.count = [], {}, opset, 0

    def add(self, op, *inputs, outputs=1, domain="", **attributes):
        names = [f"v{self.count + i}" for i in range(outputs)]
        self.count += outputs
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def hold(self, array, name="c"):
        name = f"{name}{len(self.arrays)}"
        self.arrays[name] = np.ascontiguousarray(array)
        return name


def scaled(weight, axis, low, high, symmetric):
    """Scale and zero point of the whole weight (axis None) or along an axis."""
    over = None if axis is None else tuple(at for at in range(weight.ndim) if at != axis)
    if symmetric:
        scale = np.abs(weight).max(over) / high
        return np.asarray(scale, np.float32), np.zeros_like(scale)
    least, most = np.minimum(weight.min(over), 0), np.maximum(weight.max(over), 0)
    scale = np.asarray((most - least) / (high - low), np.float32)
    return scale, np.rint(low - least / scale)


def spread(numbers, axis, ndim):
    numbers = np.asarray(numbers)
    return numbers if axis is None else numbers.reshape([-1 if at == axis else 1 for at in range(ndim)])


def quantized(weight, axis, low, high, symmetric, dtype):
    scale, zero = scaled(weight, axis, low, high, symmetric)
    s, z = (spread(one, axis, weight.ndim) for one in (scale, zero))
    q = np.clip(np.rint(weight / s + z), low, high)
    return q.astype(dtype), scale, zero.astype(dtype), ((q - z) * np.float32(s)).astype(np.float64)


INTEGERS = {
    "int8": (-127, 127, True, np.int8),
    "uint8": (0, 255, False, np.uint8),
    "int16": (-32767, 32767, True, np.int16),
    "int4": (-7, 7, True, ml_dtypes.int4),
    "uint4": (0, 15, False, ml_dtypes.uint4),
}


def plain(kind, axis_of=lambda w, out: None):
    """DequantizeLinear over the stored weight."""

    def store(g, weight, out):
        axis = axis_of(weight, out)
        q, scale, zero, exact = quantized(weight, axis, *INTEGERS[kind])
        given = {} if axis is None else {"axis": axis}
        return g.add("DequantizeLinear", g.hold(q, "q"), g.hold(scale, "s"), g.hold(zero, "z"), **given), exact

    return store


def cast_mul(subtract):
    """As a converter writes it that knows no DequantizeLinear: Cast, Sub, Mul."""

    def store(g, weight, out):
        q, scale, zero, exact = quantized(weight, out, *INTEGERS["uint8" if subtract else "int8"])
        value = g.add("Cast", g.hold(q, "q"), to=TensorProto.FLOAT)
        if subtract:
            value = g.add("Sub", value, g.hold(spread(zero.astype(np.float32), out, weight.ndim)))
        return g.add("Mul", value, g.hold(spread(scale, out, weight.ndim))), exact

    return store


def float8(dtype):
    def store(g, weight, out):
        scale = np.float32(np.abs(weight).max() / float(ml_dtypes.finfo(dtype).max))
        q = (weight / scale).astype(dtype)
        value = g.add("DequantizeLinear", g.hold(q, "q"), g.hold(np.float32(scale), "s"))
        return value, q.astype(np.float64) * np.float64(scale)

    return store


def blocked(kind, size=4):
    def store(g, weight, out):
        axis = 1 - out if weight.ndim == 2 else 1
        moved = np.moveaxis(weight, axis, -1)
        parts = moved.reshape(-1, size)
        q, scale, zero, exact = quantized(parts, 0, *INTEGERS[kind])
        shape = (*moved.shape[:-1], moved.shape[-1] // size)
        q, exact = (np.moveaxis(one.reshape(moved.shape), -1, axis) for one in (q, exact))
        scale, zero = (np.moveaxis(one.reshape(shape), -1, axis) for one in (scale, zero))
        held = g.hold(q, "q"), g.hold(scale, "s"), g.hold(zero, "z")
        return g.add("DequantizeLinear", *held, axis=axis, block_size=size), exact

    return store


def transposed(inner, before):
    """Stored the other way round; turned after it is dequantised, or the integers before."""

    def store(g, weight, out):
        order = list(range(weight.ndim))[::-1]
        turned = np.ascontiguousarray(weight.transpose(order))
        if before:
            q, scale, zero, exact = quantized(turned, None, *INTEGERS["int8"])
            value = g.add("Transpose", g.hold(q, "q"), perm=order)
            value = g.add("DequantizeLinear", value, g.hold(scale, "s"), g.hold(zero, "z"))
        else:
            value, exact = inner(g, turned, weight.ndim - 1 - out)
            value = g.add("Transpose", value, perm=order)
        return value, exact.transpose(order)

    return store


def packed(how):
    """One third of a packed weight."""

    def store(g, weight, out):
        rest = [np.random.default_rng(seed).normal(size=weight.shape).astype(np.float32) for seed in (7, 8)]
        value, exact = plain("int8")(g, np.concatenate([rest[0], weight, rest[1]], out), out)
        size = weight.shape[out]
        exact = np.take(exact, range(size, 2 * size), out)
        if how == "Slice":
            bounds = [g.hold(np.array([one], np.int64)) for one in (size, 2 * size, out)]
            return g.add("Slice", value, *bounds), exact
        if g.opset >= 18:
            return g.add("Split", value, outputs=3, axis=out, num_outputs=3)[1], exact
        return g.add("Split", value, outputs=3, axis=out)[1], exact

    return store


def reshaped(g, weight, out):
    q, scale, zero, exact = quantized(weight.reshape(-1, 4), None, *INTEGERS["int8"])
    value = g.add("DequantizeLinear", g.hold(q, "q"), g.hold(scale, "s"), g.hold(zero, "z"))
    shape = g.hold(np.array(weight.shape, np.int64))
    return g.add("Reshape", value, shape), exact.reshape(weight.shape)


def trained(g, weight, out):
    """Quantisation-aware training: the weight is stored in floating point, then quantised and dequantised."""
    _, scale, zero, exact = quantized(weight, None, *INTEGERS["int8"])
    held = g.hold(scale, "s"), g.hold(zero, "z")
    return g.add("DequantizeLinear", g.add("QuantizeLinear", g.hold(weight, "w"), *held), *held), exact


def by_row(weight, out):
    return out


# storage -> (what writes it, the oldest opset that has it)
STORAGE = {
    "int8": (plain("int8"), 10),
    "uint8": (plain("uint8"), 10),
    "int8 by axis": (plain("int8", by_row), 13),
    "uint8 by axis": (plain("uint8", by_row), 13),
    "Cast Mul": (cast_mul(False), 10),
    "Cast Sub Mul": (cast_mul(True), 10),
    "Transpose after": (transposed(plain("uint8"), False), 10),
    "Transpose after, by axis": (transposed(plain("int8", by_row), False), 13),
    "Transpose before": (transposed(None, True), 10),
    "Split": (packed("Split"), 10),
    "Slice": (packed("Slice"), 10),
    "Reshape": (reshaped, 10),
    "QAT": (trained, 10),
    "float8e4m3fn": (float8(ml_dtypes.float8_e4m3fn), 19),
    "float8e5m2": (float8(ml_dtypes.float8_e5m2), 19),
    "int16": (plain("int16"), 21),
    "int4": (plain("int4"), 21),
    "uint4 by axis": (plain("uint4", by_row), 21),
    "int4 in blocks": (blocked("int4"), 21),
    "uint4 in blocks": (blocked("uint4"), 21),
    "int8 in blocks": (blocked("int8"), 21),
}
