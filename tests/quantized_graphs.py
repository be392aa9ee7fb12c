"""Small ONNX models around one quantised linear: every op, side, transpose, storage and graph level that tools write.

A case is (product, storage, level, opset).  `build` gives the model, its input, the matrix W [out, in] that the model
computes with, and what y(W) is in float64.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from quantized_storage import STORAGE, Graph

IN, OUT, ROWS = 32, 12, 3
MS = "com.microsoft"


@dataclasses.dataclass
class Product:
    """A floating op that multiplies by the weight.

    `shape` is the weight's in the op, `out` its output axis; `of` computes y from W [out, in] and x in float64.
    """

    x: tuple
    shape: Callable
    out: int
    write: Callable
    of: Callable
    oldest: int = 10


def gemm(side, trans_a, trans_b):
    """alpha A' B' + beta C with the weight on a side."""
    flags = {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "beta": 2.0}
    turned = trans_b if side else trans_a
    stored_turned = bool(turned) == bool(side)  # whether the weight is stored as [out, in]
    x = (ROWS, IN) if side else (IN, ROWS)
    x = x[::-1] if (trans_a if side else trans_b) else x

    def write(g, x, w):
        c = g.hold(C if side else C[:, None])
        return g.add("Gemm", *((x, w) if side else (w, x)), c, **flags)

    def of(weight, x):
        if side:
            return 0.5 * (x.T if trans_a else x) @ weight.T + 2 * C
        return 0.5 * weight @ (x.T if trans_b else x) + 2 * C[:, None]

    return Product(x, lambda w: w if stored_turned else w.T, 0 if stored_turned else 1, write, of)


def fused(side, trans_a, trans_b):
    flags = {"transA": trans_a, "transB": trans_b, "alpha": 0.5}
    stored_turned = bool(trans_b if side else trans_a) == bool(side)
    x = (2, ROWS, IN) if side else (2, IN, ROWS)
    x = (2, *x[:0:-1]) if (trans_a if side else trans_b) else x

    def write(g, x, w):
        return g.add("FusedMatMul", *((x, w) if side else (w, x)), domain=MS, **flags)

    def of(weight, x):
        if side:
            return 0.5 * (x.swapaxes(1, 2) if trans_a else x) @ weight.T
        return 0.5 * weight @ (x.swapaxes(1, 2) if trans_b else x)

    return Product(x, lambda w: w if stored_turned else w.T, 0 if stored_turned else 1, write, of)


def convolution(axes, **attributes):
    def of(weight, x):
        step = attributes.get("strides", [1] * axes)
        x = x[(slice(None), slice(None), *(slice(None, None, one) for one in step))]
        return np.einsum("oi,bi...->bo...", weight, x)

    def write(g, x, w):
        return g.add("Conv", x, w, kernel_shape=[1] * axes, **attributes)

    return Product((2, IN, *range(4, 4 + axes)), lambda w: w.reshape(*w.shape, *[1] * axes), 0, write, of)


def einsum(equation, x, out, numpy_equation):
    def write(g, x, w):
        return g.add("Einsum", *((x, w) if equation.index(",") > 2 else (w, x)), equation=equation)

    shape = (lambda w: w) if out == 0 else (lambda w: w.T)
    return Product(x, shape, out, write, lambda w, x: np.einsum(numpy_equation, w, x), 12)


C = np.random.default_rng(11).normal(size=OUT).astype(np.float32)
right = lambda g, x, w: g.add("MatMul", x, w)  # noqa: E731
left = lambda g, x, w: g.add("MatMul", w, x)  # noqa: E731
PRODUCTS = {
    "MatMul": Product((2, ROWS, IN), lambda w: w.T, 1, right, lambda w, x: x @ w.T),
    "MatMul of a line": Product((IN,), lambda w: w.T, 1, right, lambda w, x: x @ w.T),
    "MatMul, left": Product((2, IN, ROWS), lambda w: w, 0, left, lambda w, x: w @ x),
    "MatMul of a line, left": Product((IN,), lambda w: w, 0, left, lambda w, x: w @ x),
    "Conv": convolution(2),
    "Conv, strides": convolution(2, strides=[2, 3]),
    "Conv of a line": convolution(1),
    "Einsum": einsum("bsi,oi->bso", (2, ROWS, IN), 0, "oi,bsi->bso"),
    "Einsum, turned": einsum("io,bis->bso", (2, IN, ROWS), 1, "oi,bis->bso"),
}
for _side in (1, 0):
    for _a in (0, 1):
        for _b in (0, 1):
            _label = f"{'' if _side else ', left'}{', transA' * _a}{', transB' * _b}"
            PRODUCTS[f"Gemm{_label}"] = gemm(_side, _a, _b)
            PRODUCTS[f"FusedMatMul{_label}"] = fused(_side, _a, _b)


@dataclasses.dataclass
class Built:
    """A model, its input, the weight W [out, in] that it computes with, and y(W, x)."""

    model: onnx.ModelProto
    x: np.ndarray
    weight: np.ndarray
    of: Callable


def weight_and_input(shape):
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(OUT, IN)).astype(np.float32)
    # Of numbers that a scale of 1/64 holds exactly, with a sum that is not near zero.
    return weight, (rng.integers(-60, 100, shape) / 64).astype(np.float32)


def build(product, storage, level, opset):
    """A model with one floating product of a stored weight."""
    one = PRODUCTS[product]
    weight, x = weight_and_input(one.x)
    g = Graph(opset)
    value, exact = STORAGE[storage][0](g, np.ascontiguousarray(one.shape(weight)), one.out)
    g.nodes.append(helper.make_node("Identity", [one.write(g, "x", value)], ["o"]))
    back = exact.reshape(exact.shape[:2])
    return Built(wrapped(g, x, level, opset), x, back if one.out == 0 else back.T, one.of)


def wrapped(g, x, level, opset):
    """The graph as it is, in a branch of If, in the body of a Loop, or in a local function."""
    value = helper.make_tensor_value_info
    held = [numpy_helper.from_array(array, name) for name, array in g.arrays.items()]
    inside = value("o", TensorProto.FLOAT, None)
    functions = []
    if level == "main":
        nodes, tensors = [*g.nodes[:-1], helper.make_node("Identity", g.nodes[-1].input, ["y"])], held
    elif level == "If":
        opset = max(opset, 11)  # the branches give other shapes
        other = helper.make_graph([helper.make_node("Identity", ["x"], ["p"])], "e", [], [value("p", 1, None)])
        then = helper.make_graph(g.nodes, "t", [], [inside], held)
        nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)]
        tensors = [numpy_helper.from_array(np.array(True), "flag")]
    elif level == "If, weight outside":
        opset = max(opset, 11)
        other = helper.make_graph([helper.make_node("Identity", ["x"], ["p"])], "e", [], [value("p", 1, None)])
        then = helper.make_graph(g.nodes, "t", [], [inside])
        nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)]
        tensors = [numpy_helper.from_array(np.array(True), "flag"), *held]
    elif level == "Loop":
        opset = max(opset, 11)
        going = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])]
        nodes = [*g.nodes, helper.make_node("Identity", ["go"], ["on"])]
        body = helper.make_graph(nodes, "body", going, [value("on", TensorProto.BOOL, []), inside], held)
        nodes = [helper.make_node("Loop", ["n", "flag"], ["ys"], body=body)]
        tensors = [numpy_helper.from_array(np.array(1), "n"), numpy_helper.from_array(np.array(True), "flag")]
        if opset >= 13:
            nodes.append(helper.make_node("Squeeze", ["ys", "zero"], ["y"]))
            tensors.append(numpy_helper.from_array(np.array([0]), "zero"))
        else:
            nodes.append(helper.make_node("Squeeze", ["ys"], ["y"], axes=[0]))
    else:
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
        functions = [helper.make_function("own", "Layer", ["x", *g.arrays], ["o"], g.nodes, imports)]
        nodes, tensors = [helper.make_node("Layer", ["x", *g.arrays], ["y"], domain="own")], held
    inputs = [value("x", TensorProto.FLOAT, x.shape)]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", TensorProto.FLOAT, None)], tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    if functions:
        opsets.append(helper.make_opsetid("own", 1))
    versions = {10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
    version = max(versions[opset], 8 if functions else 0)
    return helper.make_model(graph, opset_imports=opsets, ir_version=version, functions=functions)


LEVELS = ("main", "If", "If, weight outside", "Loop", "function")
