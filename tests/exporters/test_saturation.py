"""Statically quantised activations: no vector is clipped to ranges that were calibrated on the base without a word."""

import functools
import itertools
from typing import Any

import numpy as np
import onnx
import onnx_tools as tools
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import adapter_of
from quantized_models import SHAPES, Case, Layers, Reader

import onelora_compile as onelora
from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.exporters import export_onnx, fold_onnx

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture
def case(tmp_path):
    return functools.partial(Case, folder=tmp_path)


EVERY = list(itertools.product(SHAPES, ("QDQ", "QOperator"), (False, True), (False, True), (13, 17)))


@pytest.mark.parametrize(
    ("kind", "form", "signed", "by_axis", "opset"),
    [pytest.param(*one, marks=[] if at % 9 == 0 else pytest.mark.slow) for at, one in enumerate(EVERY)],
)
def test_ranges_are_widened_to_what_the_vectors_need(kind, form, signed, by_axis, opset, case):
    one = case(kind)
    path, out = one.quantised(form, signed, by_axis, opset), one.folder / "out.onnx"
    with pytest.raises(ExportError, match="calibrated on the base"):
        fold_onnx(path, one.adapter, out, progress=False)
    assert not out.exists()
    report = fold_onnx(path, one.adapter, out, progress=False, calibration=one.feeds())
    assert report.saturation.widened
    assert report.saturation.inputs == 6
    assert 0 < max(wide.beyond for wide in report.saturation.widened.values()) < 1
    assert "were widened" in str(report.saturation)
    own, error = one.error(path, one.plain), one.error(out, one.exact)
    assert one.error(path, one.exact) > 0.15
    # Ranges that are wider have wider steps: up to the growth of the activations, measured 0.5 to 2.3 times.
    assert error < max(2.5 * own, 0.03)
    allowed = fold_onnx(path, one.adapter, out, progress=False, on_saturation="allow")
    assert "nothing was measured" in str(allowed.saturation)
    assert one.error(out, one.exact) > 2 * error


@pytest.mark.parametrize(
    ("kind", "signed", "by_axis", "opset"),
    [
        pytest.param(*one, marks=[] if at % 11 == 0 else pytest.mark.slow)
        for at, one in enumerate(itertools.product(SHAPES, (False, True), (False, True), (10, 11, 12, 13, 17, 20)))
    ],
)
def test_dynamically_quantised_activations_have_no_range_to_leave(kind, signed, by_axis, opset, case):
    one = case(kind)
    path, out = one.dynamic(signed, by_axis, opset), one.folder / "out.onnx"
    report = fold_onnx(path, one.adapter, out, progress=False)
    assert {where.how for where in report.folded.values()} == {"branch"}
    assert not report.saturation.quantizers
    assert one.error(path, one.exact) > 0.15
    assert one.error(out, one.exact) < max(2 * one.error(path, one.plain), 0.01)
    before = out.read_bytes()
    with pytest.raises(ExportError, match=r"holds a vector beside that weight already \(of a\)"):
        fold_onnx(out, one.adapter, out, progress=False)  # the quantised numbers are those of the base
    assert out.read_bytes() == before


def test_all_forms_of_calibration_inputs_are_one(case):
    one = case(Layers)
    path, out = one.quantised("QDQ", False, False, 13), one.folder / "out.onnx"
    many = one.inputs[0]
    one.inputs = [many]
    forms = [Reader(one.feeds()), one.feeds(), [many.numpy()], [(many,)], [[many.numpy()]], {"x": many}, many]
    seen = [fold_onnx(path, one.adapter, out, calibration=form, progress=False).saturation.widened for form in forms]
    assert all(other == seen[0] for other in seen[1:])
    before = out.read_bytes()
    for wrong in ([], [{"y": many}], [(many, many)], [{"x": many[:, :3]}]):
        with pytest.raises(ConfigError, match=r"calibration|input 'x' takes"):
            fold_onnx(path, one.adapter, out, calibration=wrong, progress=False)
    with pytest.raises(ConfigError, match="on_saturation"):
        fold_onnx(path, one.adapter, out, on_saturation="skip", progress=False)
    assert out.read_bytes() == before


def test_calibration_inputs_are_checked_where_nothing_is_quantised_too(tmp_path):
    model, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    export_onnx(model, (x,), tmp_path / "base.onnx", progress=False)
    onelora.save_adapter(onelora.adapt(torch.nn.Sequential(model)), tmp_path / "a.safetensors")
    files = (tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx")
    for wrong in ([], [{"weights": x}], [(x, x)], Reader([{"weights": x}])):
        with pytest.raises(ConfigError, match=r"calibration|input 'x' takes"):
            fold_onnx(*files, calibration=wrong, progress=False)
    assert not (tmp_path / "out.onnx").exists()
    report = fold_onnx(*files, calibration={"input": x}, progress=False)
    assert str(report.saturation) == "no range that was calibrated on the base lies behind a vector"


def graph(tail, folder, weight, kinds=(TensorProto.FLOAT,), scale=0.05, zero=128):
    """y = MatMul(x, quantised W) behind a pair of one range, and what `tail` makes of it."""
    make = helper.make_node
    w_scale = np.float32(np.abs(weight).max() / 127)
    arrays = {
        "q": np.rint(weight.T / w_scale).astype(np.int8), "ws": w_scale, "wz": np.int8(0),
        "s": np.float32(scale), "z": np.uint8(zero), "c": np.full(weight.shape[0], 0.3, np.float32),
    }  # fmt: skip
    nodes = [make("DequantizeLinear", ["q", "ws", "wz"], ["w"]), make("MatMul", ["x", "w"], ["h"]), *tail(make)]
    outs = [helper.make_tensor_value_info(f"y{at or ''}", kind, None) for at, kind in enumerate(kinds)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, weight.shape[1]])
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], outs, held), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def pair(make, x, y):
    return [make("QuantizeLinear", [x, "s", "z"], [f"{y}_q"]), make("DequantizeLinear", [f"{y}_q", "s", "z"], [y])]


def several(make):
    q = make("QuantizeLinear", ["h", "s", "z"], ["hq"])
    opened = [make("DequantizeLinear", ["hq", "s", "z"], [name]) for name in ("h1", "h2")]
    return [q, *opened, make("Mul", ["h1", "h2"], ["y"])]


# What follows a product -> the tail, and y of the product's output with pairs (q) and of the update
BEHIND = {
    "a pair": (lambda make: pair(make, "h", "y"), lambda h, u, q: q(h) + u),
    "a pair with two readers": (several, lambda h, u, q: (q(h) + u) ** 2),
    "a bias and a pair": (
        lambda make: [make("Add", ["h", "c"], ["k"]), *pair(make, "k", "y")],
        lambda h, u, q: q(h + np.float32(0.3)) + u,
    ),
    "a pair, a bias and a pair": (
        lambda make: [*pair(make, "h", "k"), make("Add", ["k", "c"], ["l"]), *pair(make, "l", "y")],
        lambda h, u, q: q(q(h) + np.float32(0.3)) + u,
    ),
}


WEIGHT = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def computed(path, vector):
    """An input, and the output, the base's product and the update of a model of `graph`."""
    x = (np.random.default_rng(1).integers(-20, 40, (3, 8)) / 32).astype(np.float32)
    wide = x.astype(np.float64)
    stored = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    base = wide @ (stored["q"].astype(np.float64) * stored["ws"])
    return x, base, wide.sum(1, keepdims=True) * vector


@pytest.mark.parametrize("kind", BEHIND)
def test_behind_a_pair_nothing_is_clipped_and_nothing_is_asked(kind, tmp_path):
    tail, expected = BEHIND[kind]
    path = graph(tail, tmp_path, WEIGHT)
    adapter, (vector,) = adapter_of(tmp_path, WEIGHT, scale=3.0)
    report = fold_onnx(path, adapter, tmp_path / "out.onnx", progress=False)
    assert not report.saturation.quantizers
    x, base, update = computed(path, vector)
    limit = 127 * 0.05
    assert np.abs(base + update).max() > 1.5 * limit
    rounded = lambda h: np.clip(np.rint(h / 0.05), -128, 127) * 0.05  # noqa: E731
    actual = tools.run(tmp_path / "out.onnx", (torch.from_numpy(x),))
    np.testing.assert_allclose(actual, expected(base, update, rounded), rtol=1e-4, atol=0.051)


AFTER = {
    "another op before the next pair": lambda make: [
        *pair(make, "h", "k"), make("Relu", ["k"], ["l"]), *pair(make, "l", "y"),
    ],
    "an output before the pair": lambda make: [*pair(make, "h", "y"), make("Identity", ["h"], ["y1"])],
    "integers that are moved": lambda make: [
        make("QuantizeLinear", ["h", "s", "z"], ["hq"]), make("Transpose", ["hq"], ["t"]),
        make("DequantizeLinear", ["t", "s", "z"], ["y"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", AFTER)
def test_what_may_still_saturate_is_named_and_widened(kind, tmp_path):
    path = graph(AFTER[kind], tmp_path, WEIGHT, (TensorProto.FLOAT,) * (1 + ("output" in kind)))
    adapter, (vector,) = adapter_of(tmp_path, WEIGHT, scale=3.0)
    x, base, update = computed(path, vector)
    with pytest.raises(ExportError, match=r"1 activations behind the vectors .*'(h|l|onelora_Add_out)'"):
        fold_onnx(path, adapter, tmp_path / "out.onnx", progress=False)
    report = fold_onnx(path, adapter, tmp_path / "out.onnx", progress=False, calibration={"x": x})
    (wide,) = report.saturation.widened.values()
    exact = base + update
    exact = np.maximum(exact, 0) if "another" in kind else exact.T if "moved" in kind else exact
    step = (wide.after[1] - wide.after[0]) / 250
    assert wide.after[1] > wide.before[1] or wide.after[0] < wide.before[0]
    actual = tools.run(tmp_path / "out.onnx", (torch.from_numpy(x),))
    np.testing.assert_allclose(actual, exact, atol=step + 0.05)


def test_a_range_that_stands_for_a_relu_goes_on_to_be_one(tmp_path):
    path = graph(lambda make: pair(make, "h", "y"), tmp_path, WEIGHT, zero=0)
    adapter, (vector,) = adapter_of(tmp_path, WEIGHT, scale=3.0)
    x, base, update = computed(path, vector)
    assert base.min() < -1
    report = fold_onnx(path, adapter, tmp_path / "out.onnx", progress=False, calibration=[{"x": x}])
    assert all(wide.after[0] == 0 for wide in report.saturation.widened.values())
    actual = tools.run(tmp_path / "out.onnx", (torch.from_numpy(x),))
    np.testing.assert_allclose(actual, np.maximum(base + update, 0), atol=0.1)


def test_a_range_from_zero_of_what_is_never_negative_is_refused(tmp_path):
    weight = np.abs(WEIGHT)
    path = graph(lambda make: pair(make, "h", "y"), tmp_path, weight, zero=0)
    adapter, _ = adapter_of(tmp_path, weight, scale=3.0)
    with pytest.raises(ExportError, match="whether a Relu was left out there can't be told"):
        fold_onnx(path, adapter, tmp_path / "out.onnx", progress=False, calibration={"x": np.ones((3, 8), np.float32)})
    assert not (tmp_path / "out.onnx").exists()


def test_integers_that_leave_the_model_keep_their_range(tmp_path):
    tail = lambda make: [make("Relu", ["h"], ["k"]), make("QuantizeLinear", ["k", "s", "z"], ["y"])]  # noqa: E731
    path = graph(tail, tmp_path, WEIGHT, (TensorProto.UINT8,))
    adapter, (vector,) = adapter_of(tmp_path, WEIGHT, scale=3.0)
    x, _, _ = computed(path, vector)
    with pytest.raises(ExportError, match=r"can't be widened: 'k' \(its integers are an output of the model\), clips"):
        fold_onnx(path, adapter, tmp_path / "out.onnx", progress=False, calibration={"x": x})
    how: dict[str, Any] = {"calibration": {"x": x}, "on_saturation": "allow"}
    report = fold_onnx(path, adapter, tmp_path / "out.onnx", progress=False, **how)
    assert list(report.saturation.clipping) == ["k"]
    assert "can't be widened and clip up to" in str(report.saturation)


def test_a_range_inside_a_body_is_not_measured(tmp_path):
    path = graph(
        lambda make: [*pair(make, "h", "k"), make("Relu", ["k"], ["l"]), *pair(make, "l", "y")], tmp_path, WEIGHT
    )
    model = onnx.load(path)
    inner, info = model.graph, helper.make_tensor_value_info
    body = helper.make_graph(list(inner.node), "then", [], list(inner.output))
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["p"])], "else", [], [info("p", 1, None)])
    node = helper.make_node("If", ["flag"], ["out"], then_branch=body, else_branch=other)
    held = [*inner.initializer, numpy_helper.from_array(np.array(True), "flag")]
    whole = helper.make_graph([node], "g", list(inner.input), [info("out", 1, None)], held)
    onnx.save(helper.make_model(whole, opset_imports=model.opset_import, ir_version=8), path)
    adapter, (vector,) = adapter_of(tmp_path, WEIGHT)
    x, _, _ = computed(path, vector)
    with pytest.raises(ExportError, match=r"can't be widened: 'l' \(it is inside a body\)"):
        fold_onnx(path, adapter, tmp_path / "out.onnx", progress=False, calibration={"x": x})
    how: dict[str, Any] = {"calibration": {"x": x}, "on_saturation": "allow"}
    report = fold_onnx(path, adapter, tmp_path / "out.onnx", progress=False, **how)
    assert report.saturation.quantizers == ("l",)
    assert "nothing was measured" in str(report.saturation)


def test_what_is_bounded_by_its_op_is_not_asked_about(tmp_path):
    tail = lambda make: [make("Tanh", ["h"], ["k"]), *pair(make, "k", "y")]  # noqa: E731
    adapter, _ = adapter_of(tmp_path, WEIGHT)
    report = fold_onnx(graph(tail, tmp_path, WEIGHT), adapter, tmp_path / "out.onnx", progress=False)
    assert not report.saturation.quantizers
