"""fold_onnx beside quantised weights: every op, side, transpose, storage, opset and graph level against float64."""

import dataclasses
import itertools

import numpy as np
import onnx
import onnx_tools as tools
import onnxruntime
import pytest
import quantized_graphs as graphs
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import adapter_of
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from quantized_operators import OPERATORS, build_operator
from quantized_storage import STORAGE, Graph, quantized

from onelora_compile.errors import ExportError
from onelora_compile.exporters import fold_onnx
from onelora_compile.weights.adapter_file import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    weight, _ = graphs.weight_and_input((1,))
    path, (vector,) = adapter_of(tmp_path_factory.mktemp("adapter"), weight)
    return read_adapter(path), vector[:, None]


def run(path, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0].astype(np.float64)


def errors(built, adapter, folder):
    """Largest errors of the base and of the folded model, and the largest number in the output."""
    file, vector = adapter
    onnx.save(built.model, folder / "m.onnx")
    before = built.of(built.weight, built.x.astype(np.float64))
    after = built.of(built.weight + vector, built.x.astype(np.float64))
    assert np.abs(after - before).max() > 0.1 * np.abs(before).max()
    fold_onnx(folder / "m.onnx", file, folder / "out.onnx", progress=False)
    actual = [run(folder / name, built.x) for name in ("m.onnx", "out.onnx")]
    return np.abs(actual[0] - before).max(), np.abs(actual[1] - after).max(), np.abs(after).max()


def cases():
    """Every product with every storage at its oldest opset, and at another one and another level in turn."""
    others = itertools.cycle(itertools.product(graphs.LEVELS, (11, 12, 13, 14, 17, 18, 19, 20, 21, 22, 23)))
    for product, storage in itertools.product(graphs.PRODUCTS, STORAGE):
        oldest = max(graphs.PRODUCTS[product].oldest, STORAGE[storage][1])
        yield product, storage, "main", oldest
        level, opset = next(others)
        yield product, storage, level, max(opset, oldest)


ALL = list(cases())


def marked(every, step):
    """Each case; all but one of `step` are slow; a prime, which meets every product, storage, level and opset."""
    return [pytest.param(*case, marks=[] if at % step == 0 else pytest.mark.slow) for at, case in enumerate(every)]


@pytest.mark.parametrize(("product", "storage", "level", "opset"), marked(ALL, 11))
def test_products_of_a_dequantised_weight(product, storage, level, opset, adapter, tmp_path):
    base, folded, largest = errors(graphs.build(product, storage, level, opset), adapter, tmp_path)
    assert base < 1e-5 * largest
    assert folded < 1e-5 * largest


LEVELS = (("main", 11), ("main", 21), ("function", 17), ("If", 13), ("If, weight outside", 18), ("Loop", 12))


@pytest.mark.parametrize(("name", "level", "opset"), marked([(n, *o) for n in OPERATORS for o in LEVELS], 5))
def test_operators_that_compute_with_integers(name, level, opset, adapter, tmp_path):
    base, folded, largest = errors(build_operator(name, level, opset), adapter, tmp_path)
    if name.startswith("MatMulNBits"):
        # With an order of blocks ONNX Runtime 1.32 takes other zero points than its documentation says.
        assert base < (1.0 if "uint8 g_idx" in name else 1e-5) * largest
        assert folded < base + 1e-5 * largest
    else:  # half a step of the output, or what quantising the input changes
        assert base < 0.05 * largest
        assert folded < 1.05 * max(base, 0.25 if name.startswith("Q") else 0.0) + 1e-5 * largest


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("first", ["W", "its transpose"])
def test_a_tied_weight_is_one_function_whether_quantised_or_not(kind, square, first, adapter, tmp_path):
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(8, 8 if square else 6)).astype(np.float32)
    q, scale, zero, exact = quantized(weight, None, -127, 127, True, np.int8)
    path, vector = tools.adapter(tmp_path, weight)  # of every linear: a nameless op is no other one's
    g = Graph(13)
    if kind == "int8":
        value = g.add("DequantizeLinear", g.hold(q), g.hold(scale), g.hold(zero))
    else:
        value, exact = g.hold(weight), weight.astype(np.float64)
    turned = g.add("Transpose", value, perm=[1, 0])
    both = (turned, value) if first == "W" else (value, turned)
    y = g.add("MatMul", g.add("Tanh", g.add("MatMul", "x", both[0])), both[1])
    g.nodes.append(helper.make_node("Identity", [y], ["o"]))
    x = rng.normal(size=(3, weight.shape[first == "W"])).astype(np.float32)
    onnx.save(graphs.wrapped(g, x, "main", 13), tmp_path / "m.onnx")
    fold_onnx(tmp_path / "m.onnx", tools.used(path, 2, 2), tmp_path / "out.onnx", progress=False)
    new = exact + vector[:, None]
    new = new if first == "W" else new.T
    expected = np.tanh(x.astype(np.float64) @ new.T) @ new
    np.testing.assert_allclose(run(tmp_path / "out.onnx", x), expected, rtol=1e-4, atol=1e-4)


def fused_attention(weight):
    g = Graph(17)
    q, scale, zero, _ = quantized(weight, None, -127, 127, True, np.int8)
    x, x_scale, x_zero = g.add("DynamicQuantizeLinear", "x", outputs=3)
    held = [g.hold(q), g.hold(np.zeros(weight.shape[1], np.float32)), x_scale, g.hold(scale), "", x_zero, g.hold(zero)]
    return g, g.add("QAttention", x, *held, domain=graphs.MS, num_heads=2)


def fused_activation(weight):
    g = Graph(17)
    q, scale, zero, _ = quantized(weight.T[:, :, None, None], None, -127, 127, True, np.int8)
    value = g.add("DequantizeLinear", g.hold(q), g.hold(scale), g.hold(zero))
    image = g.add("Unsqueeze", g.add("Transpose", "x", perm=[0, 2, 1]), g.hold(np.array([3])))
    return g, g.add("FusedConv", image, value, domain=graphs.MS, activation="Relu", kernel_shape=[1, 1])


def fused_gelu(weight):
    g = Graph(17)
    q, scale, zero, _ = quantized(weight, None, -127, 127, True, np.int8)
    value = g.add("DequantizeLinear", g.hold(q), g.hold(scale), g.hold(zero))
    return g, g.add("GemmFastGelu", "x", value, domain=graphs.MS)


def unscaled(weight):
    g = Graph(17)
    q, _, zero, _ = quantized(weight, None, -127, 127, True, np.int8)
    x, _, x_zero = g.add("DynamicQuantizeLinear", "x", outputs=3)
    return g, g.add("Cast", g.add("MatMulInteger", x, g.hold(q), x_zero, g.hold(zero)), to=TensorProto.FLOAT)


@pytest.mark.parametrize("write", [fused_attention, fused_activation, fused_gelu, unscaled])
def test_what_takes_no_branch_is_refused_by_the_names_of_its_vectors(write, tmp_path):
    weights = [np.random.default_rng(seed).normal(size=(8, 8)).astype(np.float32) for seed in range(4)]
    path, _ = adapter_of(tmp_path, *weights)
    g, y = write(np.concatenate([w.T for w in weights[:3]], 1))
    g.nodes.append(helper.make_node("Identity", [y], ["h"]))
    y = g.add("MatMul", "x", g.hold(weights[3].T))
    g.nodes.append(helper.make_node("Identity", [y], ["o"]))
    model = graphs.wrapped(g, np.zeros((1, 3, 8), np.float32), "main", 17)
    model.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"3 of 4 vectors have no place in .*: 0: .*; 1: .*; 2: "):
        fold_onnx(tmp_path / "m.onnx", path, tmp_path / "out.onnx", progress=False)
    assert not (tmp_path / "out.onnx").exists()
    report = fold_onnx(tmp_path / "m.onnx", path, tmp_path / "out.onnx", on_unmatched="skip", progress=False)
    assert set(report.folded) == {"3"}
    assert set(report.skipped) == {"0", "1", "2"}


def test_packings_that_are_not_read_are_named(tmp_path):
    weights = [np.random.default_rng(seed).normal(size=(32, 64)).astype(np.float32) for seed in range(2)]
    path, _ = adapter_of(tmp_path, *weights)
    g = Graph(17)
    for weight, name in zip(weights, "ho", strict=True):
        g.nodes.append(helper.make_node("Identity", [g.add("MatMul", "x", g.hold(weight.T))], [name]))
    model = graphs.wrapped(g, np.zeros((1, 3, 64), np.float32), "main", 17)
    model.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    quantizer = MatMulBnb4Quantizer(model, MatMulBnb4Quantizer.NF4, 32)
    quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"0: no weight of its shape; 1: .*Not read are the weights of MatMulBnb4\."):
        fold_onnx(tmp_path / "m.onnx", path, tmp_path / "out.onnx", progress=False)


@pytest.mark.parametrize("level", graphs.LEVELS)
def test_a_file_that_already_holds_the_names_that_folding_gives(level, adapter, tmp_path):
    built = graphs.build("MatMul, left", "int8", level, 17)
    taken = [
        "0.vector",
        "onelora_last_axis",
        "onelora_MatMul",
        "onelora_MatMul_out",
        "onelora_Add_out",
        f"onelora_ones_{graphs.IN}",
    ]
    graph = built.model.graph
    for name in taken:
        graph.initializer.append(numpy_helper.from_array(np.full(graphs.OUT, 9, np.float32), name))
    _, folded, largest = errors(dataclasses.replace(built), adapter, tmp_path)
    assert folded < 1e-5 * largest
