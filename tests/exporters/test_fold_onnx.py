"""fold_onnx: every weight is found in files of other tools, by its numbers; nothing else changes."""

import copy
import warnings

import ml_dtypes
import numpy as np
import onnx
import onnx_tools as tools
import onnxruntime
import pytest
import torch
from architectures import ARCHITECTURES
from architectures.outputs import main_output
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import BaseMismatchError, ExportError
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import fill_vectors, merged_copy, perturb_norms

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Case:
    """A base model, an adapter file of it, and what base and adapted model compute in float64."""

    def __init__(self, name, folder, scale=0.05):
        base, inputs = ARCHITECTURES[name]()
        if name == "t5":
            base, inputs = base.encoder, {key: inputs[key] for key in ("input_ids", "attention_mask")}
        if name == "whisper":
            base, inputs = base.get_encoder(), {"input_features": inputs["input_features"]}
        if hasattr(base, "config") and hasattr(base, "set_attn_implementation"):
            base.set_attn_implementation("eager")  # what the tools know how to fuse
        self.base, self.inputs, self.folder = base, inputs, folder
        self.model = fill_vectors(onelora.adapt(copy.deepcopy(base)), scale)
        self.vectors = onelora.vectors(self.model)
        self.adapter = folder / "a.safetensors"
        onelora.save_adapter(self.model, self.adapter)
        self.main, self.args = tools.wrapped(base, inputs, main_output)
        self.plain = self.reference(copy.deepcopy(base).double())
        self.exact = self.reference(merged_copy(self.model, torch.float64))

    def reference(self, model):
        wide = {key: v.double() if v.is_floating_point() else v for key, v in self.inputs.items()}
        with torch.no_grad():
            return main_output(model(**wide)).numpy()

    def relative(self, actual, expected):
        return np.abs(actual - expected).max() / np.abs(expected).max()

    def effect(self):
        return self.relative(self.plain, self.exact)


def produced(case, tool):
    path = case.folder / f"{tool.__name__}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tool(case.main, case.args, path)
    return path


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


def test_floating_zero_points_hold_the_vector(tmp_path):
    rng = np.random.default_rng(0)
    n, k, block = 8, 64, 16
    q = rng.integers(0, 16, (n, k // block, block), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.1, (n, k // block)).astype(np.float32)
    zero = rng.uniform(6, 9, (n, k // block)).astype(np.float32)
    weight = ((q - zero[..., None]) * scale[..., None]).reshape(n, k)
    packed = q[..., 0::2] | q[..., 1::2] << 4
    attributes = {"K": k, "N": n, "bits": 4, "block_size": block}
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "q", "s", "z"], ["y"], domain="com.microsoft", accuracy_level=1, **attributes
    )
    arrays = {"q": packed, "s": scale.flatten(), "z": zero.flatten()}
    save_graph(tmp_path / "m.onnx", [node], arrays, ("x", [3, k]), ("y", [3, n]), [("com.microsoft", 1)])
    adapter, vector = adapter_of(tmp_path, weight)
    report = fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    assert [one.how for one in report.folded.values()] == ["zero points"]
    assert len(onnx.load(tmp_path / "out.onnx").graph.node) == 1
    x = rng.normal(size=(3, k)).astype(np.float32)
    expected = x.astype(np.float64) @ (weight.astype(np.float64) + vector[:, None]).T
    actual = session(tmp_path / "out.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def save_graph(path, nodes, arrays, x, y, opsets=(), name="x"):
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(x[0], onnx.TensorProto.FLOAT, x[1])],
        [onnx.helper.make_tensor_value_info(y[0], onnx.TensorProto.FLOAT, y[1])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    imports = [onnx.helper.make_opsetid("", 18), *(onnx.helper.make_opsetid(*one) for one in opsets)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=9), path)
    return path


def adapter_of(folder, *weights, scale=0.3):
    """An adapter of linears with given weights [out, in], and its vectors."""
    torch.manual_seed(1)
    linears = [nn.Linear(w.shape[1], w.shape[0]) for w in weights]
    with torch.no_grad():
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.copy_(torch.from_numpy(np.asarray(weight)))
    model = fill_vectors(onelora.adapt(nn.Sequential(*linears)), scale)
    onelora.save_adapter(model, folder / "own.safetensors")
    vectors = [v.detach().double().numpy() for v in onelora.vectors(model).values()]
    return folder / "own.safetensors", vectors[0] if len(vectors) == 1 else vectors


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


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
    adapter, vector = adapter_of(tmp_path, WEIGHT)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    x = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    exact = factor * x.astype(np.float64) @ (WEIGHT.astype(np.float64) + vector[:, None]).T
    tolerance = {2: 1e-2, 4: 1e-5}[min((v.dtype.itemsize for v in arrays.values()), default=4)]
    if any(v.dtype == ml_dtypes.bfloat16 for v in arrays.values()):
        tolerance = 5e-2
    np.testing.assert_allclose(
        session(tmp_path / "out.onnx").run(None, {"x": x})[0], exact, rtol=tolerance, atol=tolerance
    )


def test_a_square_weight_is_told_from_its_transpose(tmp_path):
    weight = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    save_graph(tmp_path / "m.onnx", [node], {"w": weight.T.copy()}, ("x", [2, 6]), ("y", [2, 6]))
    adapter, vector = adapter_of(tmp_path, weight)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    (folded,) = onnx.load(tmp_path / "out.onnx").graph.initializer
    np.testing.assert_allclose(onnx.numpy_helper.to_array(folded), weight.T + vector, rtol=1e-6)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.relu(self.body(self.embed(ids))))


@pytest.mark.parametrize("tool", ["dynamo", "dynamo_plain", "torchscript", "torchscript_plain"])
def test_a_tied_embedding_never_changes(tool, tmp_path):
    torch.manual_seed(0)
    base, ids = Tied(), torch.randint(0, 11, (2, 5))
    path = tools.PLAIN[tool](base, (ids,), tmp_path / "m.onnx")
    config = onelora.OneLoRAConfig(target_modules=["body", "head"])
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), config), 0.5)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx")
    with torch.no_grad():
        expected = model(ids).numpy()
    np.testing.assert_allclose(tools.run(tmp_path / "out.onnx", (ids,)), expected, rtol=1e-4, atol=1e-4)
    stored = [onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "out.onnx").graph.initializer]
    assert any(np.array_equal(one, base.embed.weight.detach().numpy()) for one in stored)


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("tool", ["dynamo", "dynamo_plain", "torchscript", "torchscript_plain"])
@pytest.mark.parametrize("adapted", [["a"], ["b"], ["a", "b"]])
def test_layers_with_equal_weights_are_told_apart_by_their_names(tool, adapted, tmp_path):
    torch.manual_seed(0)
    base, x = Twins(), torch.randn(2, 3, 6)
    path = tools.PLAIN[tool](base, (x,), tmp_path / "m.onnx")
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(target_modules=adapted)), 0.5)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx")
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(tools.run(tmp_path / "out.onnx", (x,)), expected, rtol=1e-4, atol=1e-5)


def test_layers_with_equal_weights_and_no_names_are_refused(tmp_path):
    make = onnx.helper.make_node
    nodes = [make("MatMul", ["x", "w"], ["h"]), make("Tanh", ["h"], ["t"]), make("MatMul", ["t", "w2"], ["y"])]
    weight = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
    save_graph(tmp_path / "m.onnx", nodes, {"w": weight.T.copy(), "w2": weight.T.copy()}, ("x", [2, 6]), ("y", [2, 6]))
    adapter, _ = adapter_of(tmp_path, weight, weight)
    with pytest.raises(ExportError, match="no names tell them apart"):
        fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_the_packed_weight_of_fused_attention(tmp_path):
    case = Case("vit", tmp_path)
    path = produced(case, tools.ort_attention)
    packed = {node.input[1] for node in onnx.load(path).graph.node if node.op_type == "Attention"}
    report = fold_onnx(path, case.adapter, tmp_path / "out.onnx")
    into = [one.where[0] for name, one in report.folded.items() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert packed
    assert set(into) == packed


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
    adapter, vector = adapter_of(tmp_path, weight)
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
    adapter, vector = adapter_of(tmp_path, 0.3 * weight)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    x = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    expected = x @ np.linalg.matrix_power(0.3 * weight.T + vector, 3)
    actual = session(tmp_path / "out.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


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


def test_a_vector_whose_layer_the_export_dropped_is_refused_by_name(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    base = perturb_norms(BertModel(BertConfig(**sizes, vocab_size=20))).eval()
    main, args = tools.wrapped(base, {"input_ids": torch.randint(0, 20, (2, 5))}, lambda out: out.last_hidden_state)
    path = tools.dynamo(main, args, tmp_path / "m.onnx")
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(ExportError, match=r"pooler\.dense: no weight is its base's"):
        fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    report = fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx", on_unmatched="skip")
    assert list(report.skipped) == ["pooler.dense"]
    with torch.no_grad():
        expected = model(*args).last_hidden_state.numpy()
    np.testing.assert_allclose(tools.run(tmp_path / "out.onnx", args), expected, rtol=1e-4, atol=1e-4)


def test_another_base_is_refused(tmp_path):
    case = Case("bert", tmp_path)
    with torch.no_grad():
        for parameter in case.main.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    path = produced(case, tools.torchscript)
    with pytest.raises(BaseMismatchError, match="not the base of the adapter"):
        fold_onnx(path, case.adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_folded_model_is_not_a_base_any_more(tmp_path):
    case = Case("bert", tmp_path)
    path = produced(case, tools.torchscript)
    fold_onnx(path, case.adapter, path)
    with pytest.raises(BaseMismatchError, match=r"It holds an adapter already \(a\)"):
        fold_onnx(path, case.adapter, path)


def test_trained_norms_and_heads_go_in_by_name(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
    x = torch.randn(3, 6)
    path = tools.dynamo(base, (x,), tmp_path / "m.onnx")
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(train_norms=True)), 0.2)
    with torch.no_grad():
        model[0].weight.add_(0.5)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    report = fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx")
    assert set(report.replaced) == {"0.weight", "0.bias"}
    with torch.no_grad():
        np.testing.assert_allclose(tools.run(tmp_path / "out.onnx", (x,)), model(x).numpy(), rtol=1e-5, atol=1e-5)
