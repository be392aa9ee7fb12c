"""Norms that overflow in float16 in TensorRT: what is rewritten computes the same, and is said."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from half_evaluator import evaluate
from onnx_graphs import operators, run

from onelora_compile.exporters.faults.rewrite import rewrite_for
from onelora_compile.exporters.jetson.device.core.faults import HALF_NORM


def norm(kind, opset, dtype=np.float16, width=16, power="Pow"):
    """A norm as exporters write it out."""
    made = onnx.helper.make_node
    axes: dict[str, Any] = {"axes": [-1]}

    def reduced(op_type, x, y):
        return made(op_type, [x], [y], **axes) if opset < 18 else made(op_type, [x, "axis"], [y])

    square = ["d", "two"] if power == "Pow" else ["d", "d"]
    start = {"layer": [reduced("ReduceMean", "x", "m"), made("Sub", ["x", "m"], ["d"])]}
    nodes = start.get(kind, [made("Identity", ["x"], ["d"])])
    nodes += [
        made(power, square, ["p"]),
        reduced("ReduceSum" if kind == "l2" and opset >= 18 else "ReduceMean", "p", "v"),
        made("Add", ["v", "epsilon"], ["e"]),
        made("Sqrt", ["e"], ["r"]),
    ]
    if kind == "rms":
        nodes += [made("Reciprocal", ["r"], ["i"]), made("Mul", ["d", "i"], ["n"])]
    else:
        nodes += [made("Div", ["d", "r"], ["n"])]
    nodes += [made("Mul", ["n", "scale"], ["t"]), made("Add", ["t", "bias"], ["y"])]
    generator, kind_of = np.random.default_rng(0), onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    arrays = {
        "two": np.array(2, dtype),
        "epsilon": np.array(1e-5, dtype),
        "scale": generator.normal(size=width).astype(dtype),
        "bias": generator.normal(size=width).astype(dtype),
        "axis": np.array([-1]),
    }
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", kind_of, ["batch", width])],
        [onnx.helper.make_tensor_value_info("y", kind_of, ["batch", width])],
        [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    return ir.from_proto(model), arrays


def exact_norm(kind, x, arrays, total):
    wide = x.astype(np.float64)
    d = wide - wide.mean(-1, keepdims=True) if kind == "layer" else wide
    v = (d**2).sum(-1, keepdims=True) if total else (d**2).mean(-1, keepdims=True)
    return d / np.sqrt(v + 1e-5) * arrays["scale"].astype(np.float64) + arrays["bias"].astype(np.float64)


@pytest.mark.parametrize("power", ["Pow", "Mul"])
@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("kind", ["layer", "rms", "l2"])
def test_norms_in_float16_hold_what_overflowed(kind, opset, power, tmp_path):
    model, arrays = norm(kind, opset, power=power)
    x = (np.random.default_rng(1).normal(size=(4, 16)) * 3000).astype(np.float16)
    exact = exact_norm(kind, x, arrays, kind == "l2" and opset >= 18)
    (wrong,) = evaluate(model, x=x)
    assert not np.abs(wrong - exact).max() < 0.1  # the norm is zero, or NaN
    done = rewrite_for(model, "10.16.2", True)
    assert len(done.notes) == 1
    assert "3657" in done.notes[0]
    assert HALF_NORM not in done.graphs
    for (found,) in (evaluate(model, x=x), [run(model, tmp_path / "m.onnx", x=x)]):
        assert np.abs(found - exact).max() < 4e-3 * np.abs(exact).max()
    one = kind == "layer" and opset >= 17
    assert ("LayerNormalization" in operators(model)) == one
    assert operators(model).count("Cast") == (0 if one else 2)
    if one:
        assert operators(model) == ["LayerNormalization"]
        assert model.graph.node(0).attributes["stash_type"].as_int() == 1


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_in_float32_are_left_alone_unless_tensorrt_may_halve_them(kind):
    strong, _ = norm(kind, 18, np.float32)
    before = operators(strong)
    assert rewrite_for(strong, "10.3.0", True).notes == []
    assert operators(strong) == before
    weak, _ = norm(kind, 18, np.float32)
    done = rewrite_for(weak, "10.3.0", True, weak=True)
    # The operator has its float32 inside; for another norm nothing can be said in the model.
    assert (operators(weak) == ["LayerNormalization"], HALF_NORM in done.graphs) == (kind == "layer", kind == "rms")


def test_a_norm_of_squares_that_are_not_reduced_is_none():
    made = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [made("Mul", ["x", "x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, [3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, [3])],
    )
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))
    assert rewrite_for(model, "10.3.0", True).notes == []
