"""Files that list initializers as inputs, so that a call may give other numbers: none is taken without a word."""

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import adapter_of, assert_arrays, four_bits, save_graph, session

import onelora_compile as onelora
from onelora_compile.exporters import fold_onnx

MAKE = onnx.helper.make_node
WEIGHT = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
STORED = np.ascontiguousarray(WEIGHT.T)


def listed(path, ir_version):
    """The file with every initializer among its inputs."""
    model = onnx.load(path)
    given = [onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in model.graph.initializer]
    model.graph.input.extend(given)
    model.ir_version = ir_version
    if ir_version < 4:
        model.opset_import[0].version = 10
    onnx.save(model, path)


def assert_product(found, x, weight):
    """That it is x Wᵀ."""
    assert_arrays(found, x.astype(np.float64) @ weight.astype(np.float64).T, x @ weight.astype(np.float32).T)


def graphs():
    """Nodes, arrays and base weight of files whose fold writes numbers that were computed from others, and these."""
    product = MAKE("MatMul", ["x", "v"], ["y"])
    yield "scaled", [MAKE("Mul", ["w", "s"], ["v"]), product], {"w": STORED / 2, "s": np.float32(2)}, WEIGHT, ["s", "w"]
    cut = [MAKE("Slice", ["w", "from", "to", "axis"], ["v"]), product]
    bounds = {"from": np.array([0]), "to": np.array([5]), "axis": np.array([1])}
    arrays = {"w": np.concatenate([STORED, STORED + 1], 1), **bounds}
    yield "cut", cut, arrays, WEIGHT, ["axis", "from", "to", "w"]
    looked = [MAKE("Gather", ["w", "i"], ["g"]), MAKE("Sub", ["x", "g"], ["d"]), MAKE("Transpose", ["w"], ["v"])]
    arrays = {"w": WEIGHT, "i": np.array([0, 1, 2])}
    yield "shared", [*looked, MAKE("MatMul", ["d", "v"], ["y"])], arrays, WEIGHT, ["w"]


GRAPHS = {name: rest for name, *rest in graphs()}


def folded(tmp_path, form, ir_version):
    nodes, arrays, weight, computed = GRAPHS[form]
    save_graph(tmp_path / "m.onnx", nodes, arrays, ("x", [3, 7]), ("y", [3, 5]))
    listed(tmp_path / "m.onnx", ir_version)
    adapter, (vector,) = adapter_of(tmp_path, weight)
    report = fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    x = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    found = session(tmp_path / "out.onnx").run(None, {"x": x})[0]
    assert_product(found, x - weight[:3] if form == "shared" else x, weight + vector[:, None])
    return report, x, arrays, computed


@pytest.mark.parametrize("form", GRAPHS)
def test_what_a_weight_was_computed_from_is_no_input_any_more(tmp_path, form):
    report, x, arrays, computed = folded(tmp_path, form, ir_version=9)
    assert report.fixed == computed
    assert computed[0] in str(report)
    for name in computed:  # what it gives would reach no weight
        with pytest.raises(Exception, match="Invalid input name"):
            session(tmp_path / "out.onnx").run(None, {"x": x, name: np.asarray(arrays[name])})


def test_a_weight_that_is_read_as_it_is_can_be_given(tmp_path):
    save_graph(tmp_path / "m.onnx", [MAKE("MatMul", ["x", "w"], ["y"])], {"w": STORED}, ("x", [3, 7]), ("y", [3, 5]))
    listed(tmp_path / "m.onnx", 9)
    adapter, _ = adapter_of(tmp_path, WEIGHT)
    assert fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx").fixed == []
    x = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    found = session(tmp_path / "out.onnx").run(None, {"x": x, "w": 2 * STORED})[0]
    assert_product(found, x, 2 * WEIGHT)


def test_a_head_that_the_file_also_returns_is_no_input_any_more(tmp_path):
    torch.manual_seed(0)
    head = torch.nn.Linear(7, 5, bias=False)
    model = torch.nn.Sequential(torch.nn.Linear(7, 7, bias=False), head)
    stored = {name: value.detach().numpy().T.copy() for name, value in model.named_parameters()}
    nodes = [MAKE("MatMul", ["x", "0.weight"], ["h"]), MAKE("MatMul", ["h", "1.weight"], ["y"])]
    save_graph(tmp_path / "m.onnx", nodes, stored, ("x", [3, 7]), ("y", [3, 5]))
    listed(tmp_path / "m.onnx", 9)
    proto = onnx.load(tmp_path / "m.onnx")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("1.weight", onnx.TensorProto.FLOAT, [7, 5]))
    onnx.save(proto, tmp_path / "m.onnx")
    onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["0"], modules_to_save=["1"]))
    with torch.no_grad():
        head.weight.mul_(3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert fold_onnx(tmp_path / "m.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx").fixed == ["1.weight"]
    x = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    found, held = session(tmp_path / "out.onnx").run(None, {"x": x})
    assert_product(found, x @ stored["0.weight"], 3 * stored["1.weight"].T)
    np.testing.assert_array_equal(held, stored["1.weight"])


@pytest.mark.parametrize("form", GRAPHS)
def test_initializers_of_ir_version_3_stay_constants(tmp_path, form):
    # As inputs of IR version 4 they could be given, and ONNX Runtime would compute nothing of them ahead.
    report, *_ = folded(tmp_path, form, ir_version=3)
    assert onnx.load(tmp_path / "out.onnx").ir_version == 4
    assert not session(tmp_path / "out.onnx").get_overridable_initializers()
    assert report.fixed == []


def test_zero_points_that_a_call_may_give_hold_no_vector(tmp_path):
    rng = np.random.default_rng(0)
    node, arrays, q, scale, zero = four_bits(rng)
    save_graph(tmp_path / "m.onnx", [node], arrays, ("x", [3, 64]), ("y", [3, 8]), [("com.microsoft", 1)])
    listed(tmp_path / "m.onnx", 9)
    adapter, (vector,) = adapter_of(tmp_path, ((q - zero) * scale).reshape(8, 64))
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    x = rng.normal(size=(3, 64)).astype(np.float32)
    given = {"s": 2 * scale.flatten(), "z": zero.flatten() + 1}
    other = ((q - zero - 1) * 2 * scale).reshape(8, 64).astype(np.float64)
    found = session(tmp_path / "out.onnx").run(None, {"x": x, **given})[0]
    assert_product(found, x, other + vector[:, None])
