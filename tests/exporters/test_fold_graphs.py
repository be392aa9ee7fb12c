"""fold_onnx over graphs that optimizers write of one linear: its forms, its zero points, bodies of If and Loop."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx_graphs import adapter_of, assert_arrays, four_bits, save_graph, session

from onelora_compile.errors import ExportError
from onelora_compile.exporters import fold_onnx


def test_floating_zero_points_hold_the_vector(tmp_path):
    rng = np.random.default_rng(0)
    node, arrays, q, scale, zero = four_bits(rng)
    weight = ((q - zero) * scale).reshape(8, 64)
    save_graph(tmp_path / "m.onnx", [node], arrays, ("x", [3, 64]), ("y", [3, 8]), [("com.microsoft", 1)])
    adapter, (vector,) = adapter_of(tmp_path, weight)
    report = fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    assert [one.how for one in report.folded.values()] == ["zero points"]
    assert len(onnx.load(tmp_path / "out.onnx").graph.node) == 1
    x = rng.normal(size=(3, 64)).astype(np.float32)
    expected = x.astype(np.float64) @ (weight.astype(np.float64) + vector[:, None]).T
    actual = session(tmp_path / "out.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def matmul_forms(weight):
    """One linear, y = x Wᵀ times the factor, in the forms that optimizers give it."""
    make = onnx.helper.make_node
    yield "Gemm transB", [make("Gemm", ["x", "w"], ["y"], transB=1)], {"w": weight}, 1.0
    yield "Gemm", [make("Gemm", ["x", "w"], ["y"])], {"w": weight.T.copy()}, 1.0
    yield "Gemm alpha", [make("Gemm", ["x", "w"], ["y"], transB=1, alpha=0.5)], {"w": weight}, 0.5
    yield "MatMul", [make("MatMul", ["x", "w"], ["y"])], {"w": weight.T.copy()}, 1.0
    nodes = [make("Transpose", ["w"], ["t"], perm=[1, 0]), make("MatMul", ["x", "t"], ["y"])]
    yield "Transpose", nodes, {"w": weight}, 1.0
    nodes = [make("Identity", ["w"], ["i"]), make("MatMul", ["x", "i"], ["y"])]
    yield "Identity", nodes, {"w": weight.T.copy()}, 1.0
    fused = make("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transB=1, alpha=2.0)
    yield "FusedMatMul", [fused], {"w": weight}, 2.0
    yield "scaled", [make("MatMul", ["x", "w"], ["y"])], {"w": 0.25 * weight.T}, 0.25
    constant = make("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weight.T.copy()))
    yield "Constant", [constant, make("MatMul", ["x", "w"], ["y"])], {}, 1.0
    half = weight.T.astype(np.float16)
    yield "Cast", [make("Cast", ["w"], ["c"], to=1), make("MatMul", ["x", "c"], ["y"])], {"w": half}, 1.0
    half = weight.T.astype(ml_dtypes.bfloat16)
    yield "bfloat16", [make("Cast", ["w"], ["c"], to=1), make("MatMul", ["x", "c"], ["y"])], {"w": half}, 1.0


WEIGHT = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)


@pytest.mark.parametrize(("nodes", "arrays", "factor"), [pytest.param(*f[1:], id=f[0]) for f in matmul_forms(WEIGHT)])
def test_forms_of_a_linear(nodes, arrays, factor, tmp_path):
    arrays = {name: np.ascontiguousarray(value, dtype=value.dtype) for name, value in arrays.items()}
    opsets = [("com.microsoft", 1)]
    save_graph(tmp_path / "m.onnx", nodes, arrays, ("x", [3, 7]), ("y", [3, 5]), opsets)
    adapter, (vector,) = adapter_of(tmp_path, WEIGHT)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    x = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    exact = factor * x.astype(np.float64) @ (WEIGHT.astype(np.float64) + vector[:, None]).T
    tolerance = {2: 1e-2, 4: 1e-5}[min((v.dtype.itemsize for v in arrays.values()), default=4)]
    if any(v.dtype == ml_dtypes.bfloat16 for v in arrays.values()):
        tolerance = 5e-2
    np.testing.assert_allclose(
        session(tmp_path / "out.onnx").run(None, {"x": x})[0], exact, rtol=tolerance, atol=tolerance
    )


def branches(then_weight, else_weight):
    """If(flag): x W1 else x W2, whose weights are outside (shared) or inside the bodies."""
    make = onnx.helper.make_node
    info = onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, [2, 6])

    def body(weight, name):
        held = [] if isinstance(weight, str) else [onnx.numpy_helper.from_array(weight, name)]
        node = make("MatMul", ["x", weight if isinstance(weight, str) else name], ["o"])
        return onnx.helper.make_graph([node], name, [], [info], held)

    return make("If", ["flag"], ["y"], then_branch=body(then_weight, "t"), else_branch=body(else_weight, "e"))


@pytest.mark.parametrize("inside", [True, False])
def test_weights_of_bodies(inside, tmp_path):
    weight = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
    other = np.random.default_rng(4).normal(size=(6, 6)).astype(np.float32)
    node = branches(weight.T.copy() if inside else "w", other.T.copy())
    arrays = {"flag": np.asarray(True)} | ({} if inside else {"w": weight.T.copy()})
    save_graph(tmp_path / "m.onnx", [node], arrays, ("x", [2, 6]), ("y", [2, 6]))
    adapter, (vector,) = adapter_of(tmp_path, weight)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    x = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    expected = x @ (weight.T + vector)
    np.testing.assert_allclose(session(tmp_path / "out.onnx").run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_weights_of_loops(inside, tmp_path):
    weight = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
    make, info, kind = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto
    stored = onnx.numpy_helper.from_array(0.3 * weight.T, "w")
    body = onnx.helper.make_graph(
        [make("MatMul", ["h", "w"], ["o"]), make("Identity", ["go"], ["on"])],
        "body",
        [info("i", kind.INT64, []), info("go", kind.BOOL, []), info("h", kind.FLOAT, [2, 6])],
        [info("on", kind.BOOL, []), info("o", kind.FLOAT, [2, 6])],
        [stored] if inside else [],
    )
    arrays = {"n": np.asarray(3), "yes": np.asarray(True)} | ({} if inside else {"w": 0.3 * weight.T})
    node = make("Loop", ["n", "yes", "x"], ["y"], body=body)
    save_graph(tmp_path / "m.onnx", [node], arrays, ("x", [2, 6]), ("y", [2, 6]))
    adapter, (vector,) = adapter_of(tmp_path, 0.3 * weight)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    x = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    expected = x.astype(np.float64) @ np.linalg.matrix_power(0.3 * weight.T.astype(np.float64) + vector, 3)
    actual = session(tmp_path / "out.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def with_every_initializer_as_an_input(path):
    """The file as IR version 3 has it, where an initializer is an input too."""
    model = onnx.load(path)
    given = [onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in model.graph.initializer]
    model.graph.input.extend(given)
    model.ir_version, model.opset_import[0].version = 3, 10
    onnx.save(model, path)


@pytest.mark.parametrize("form", ["shared", "constant", "quantised"])
def test_files_of_ir_version_3_take_weights_that_are_new_in_them(tmp_path, form):
    make = onnx.helper.make_node
    stored = np.ascontiguousarray(WEIGHT.T)
    arrays: dict[str, Any] = {}
    if form == "shared":  # its shape is asked for, so that the adapted use gets a weight of its own
        nodes = [make("Shape", ["w"], ["s"]), make("Reshape", ["w", "s"], ["r"]), make("MatMul", ["x", "r"], ["y"])]
        arrays, exact = {"w": stored}, WEIGHT
    elif form == "constant":
        constant = make("Constant", [], ["w"], value=onnx.numpy_helper.from_array(stored))
        nodes, exact = [constant, make("MatMul", ["x", "w"], ["y"])], WEIGHT
    else:
        scale = np.float32(np.abs(WEIGHT).max() / 127)
        q = np.round(stored / scale).astype(np.int8)
        nodes = [make("DequantizeLinear", ["q", "s", "z"], ["w"]), make("MatMul", ["x", "w"], ["y"])]
        arrays, exact = {"q": q, "s": scale, "z": np.int8(0)}, q.T * scale
    save_graph(tmp_path / "m.onnx", nodes, arrays, ("x", [3, 7]), ("y", [3, 5]))
    with_every_initializer_as_an_input(tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx")
    adapter, (vector,) = adapter_of(tmp_path, WEIGHT)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx")
    x = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    expected = x.astype(np.float64) @ (exact.astype(np.float64) + vector[:, None]).T
    plain = x @ (exact + vector[:, None].astype(np.float32)).T
    assert_arrays(session(tmp_path / "out.onnx").run(None, {"x": x})[0], expected, plain)


@pytest.mark.parametrize("form", ["product", "on the way", "quantised"])
def test_operators_of_another_domain_only_have_the_name(tmp_path, form):
    make = onnx.helper.make_node
    product = make("MatMul", ["x", "v"], ["y"], domain="" if form == "on the way" else "custom")
    nodes = [make("Identity", ["w"], ["v"]), product]
    arrays: dict[str, Any] = {"w": np.ascontiguousarray(WEIGHT.T)}
    if form == "on the way":
        nodes[0].domain = "custom"
    elif form == "quantised":
        scale = np.float32(np.abs(WEIGHT).max() / 127)
        arrays = {"w": np.round(arrays["w"] / scale).astype(np.int8), "s": scale}
        nodes[0] = make("DequantizeLinear", ["w", "s"], ["v"])
    save_graph(tmp_path / "m.onnx", nodes, arrays, ("x", [3, 7]), ("y", [3, 5]), [("custom", 1)])
    adapter, _ = adapter_of(tmp_path, WEIGHT)
    with pytest.raises(ExportError, match=r"vectors have no place .*: (its weight is 'w', which|no weight)"):
        fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
