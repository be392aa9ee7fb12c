"""fold_onnx: every weight is found in files of other tools, by its numbers; nothing else changes."""

import copy
import warnings

import numpy as np
import onnx
import onnx_tools as tools
import pytest
import torch
from fold_cases import Case, produced
from onnx_graphs import session
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import fill_vectors

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

FAST = ["bert", "gpt2", "vit"]
SLOW = ["llama", "t5", "dit", "albert", "whisper"]
# What the tools themselves can't do: torch 2.13, onnxscript 0.7.2.
FAILS = {
    ("t5", "dynamo"), ("t5", "dynamo_plain"), ("t5", "ort_basic"), ("t5", "ort_attention"), ("gpt2", "ort_attention"),
}  # fmt: skip


def cases(names, which):
    return [(name, tool) for name in names for tool in which if (name, tool) not in FAILS]


@pytest.mark.parametrize(
    ("name", "tool"),
    cases(FAST, tools.PLAIN) + [pytest.param(*one, marks=pytest.mark.slow) for one in cases(SLOW, tools.PLAIN)],
)
def test_plain_weights(name, tool, tmp_path):
    case = Case(name, tmp_path)
    path = produced(case, tools.PLAIN[tool])
    before = path.read_bytes()
    assert case.effect() > 0.1
    report = fold_onnx(path, case.adapter, tmp_path / "out.onnx")
    assert set(report.folded) == set(case.vectors)
    assert all(one.how == "weight" for one in report.folded.values())
    error = case.relative(tools.run(tmp_path / "out.onnx", case.args), case.exact)
    own = case.relative(tools.run(path, case.args), case.plain)
    assert error < max(4 * own, 1e-5 if tool != "half" else 5e-3)
    assert path.read_bytes() == before
    assert len(onnx.load(tmp_path / "out.onnx").graph.node) <= len(onnx.load(path).graph.node) + 2  # copied transposes


@pytest.mark.parametrize("tool", tools.QUANTIZED)
def test_quantised_weights_keep_their_numbers_and_get_a_branch(tool, tmp_path):
    case = Case("bert", tmp_path, scale=0.01)
    path = produced(case, tools.QUANTIZED[tool])
    names = [node.name for node in onnx.load(path).graph.input]
    feed = dict(zip(names, (value.numpy() for value in case.args), strict=True))
    report = fold_onnx(path, case.adapter, tmp_path / "out.onnx", calibration=[feed])
    assert set(report.folded) == set(case.vectors)
    assert any(one.how == "branch" for one in report.folded.values())
    assert bool(report.saturation.widened) == (tool in ("int8_qdq", "int8_operators"))
    error = case.relative(tools.run(tmp_path / "out.onnx", case.args), case.exact)
    own = case.relative(tools.run(path, case.args), case.plain)
    assert error < 1.5 * own + 0.02
    assert error < case.effect() / 2
    old = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    new = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "out.onnx").graph.initializer}
    small = [name for name in old if old[name].dtype.itemsize == 1 and old[name].ndim > 1]
    assert small
    for name in small:  # signed ones may be stored around 128
        moved = new[name] if name in new else new[f"{name}_unsigned"].astype(np.int16) - 128
        assert np.array_equal(old[name], moved)


def test_siblings_share_the_feature_sum_of_a_quantised_input(tmp_path):
    case = Case("bert", tmp_path)
    path = produced(case, tools.int4_operators)
    fold_onnx(path, case.adapter, tmp_path / "out.onnx")
    ops = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    inputs = {node.input[0] for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"}
    assert ops.count("ReduceSum") == len(inputs)


def test_the_packed_weight_of_fused_attention(tmp_path):
    case = Case("vit", tmp_path)
    path = produced(case, tools.ort_attention)
    packed = {node.input[1] for node in onnx.load(path).graph.node if node.op_type == "Attention"}
    report = fold_onnx(path, case.adapter, tmp_path / "out.onnx")
    into = [one.where[0] for name, one in report.folded.items() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert packed
    assert set(into) == packed


def test_initializers_that_are_inputs_too(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tools.exported(base, (x,), tmp_path / "m.onnx", dynamo=False, keep_initializers_as_inputs=True)
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(target_modules=["0", "1"])), 0.3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    fold_onnx(tmp_path / "m.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx")
    first = onnx.load(tmp_path / "out.onnx").graph.input[0].name
    actual = session(tmp_path / "out.onnx").run(None, {first: x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(actual, model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_trained_norms_and_heads_go_in_by_name(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
    x = torch.randn(3, 6)
    path = tools.dynamo(base, (x,), tmp_path / "m.onnx")
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(train_norms=True)), 0.2)
    with torch.no_grad():
        model.get_parameter("0.weight").add_(0.5)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    report = fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx")
    assert set(report.replaced) == {"0.weight", "0.bias"}
    with torch.no_grad():
        np.testing.assert_allclose(tools.run(tmp_path / "out.onnx", (x,)), model(x).numpy(), rtol=1e-5, atol=1e-5)
