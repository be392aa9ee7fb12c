"""fold_onnx: which weight is whose, and what belongs to no vector is refused."""

import copy
from typing import Any

import numpy as np
import onnx
import onnx_tools as tools
import pytest
import torch
from fold_cases import Case, produced
from onnx_graphs import adapter_of, save_graph
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import BaseMismatchError, ExportError
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy, perturb_norms

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def test_a_square_weight_is_told_from_its_transpose(tmp_path):
    weight = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    save_graph(tmp_path / "m.onnx", [node], {"w": weight.T.copy()}, ("x", [2, 6]), ("y", [2, 6]))
    adapter, (vector,) = adapter_of(tmp_path, weight)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    (folded,) = onnx.load(tmp_path / "out.onnx").graph.initializer
    np.testing.assert_allclose(onnx.numpy_helper.to_array(folded), weight.T + vector, rtol=1e-6)


class Gated(nn.Module):
    def __init__(self, few):
        super().__init__()
        self.gate, self.body = nn.Linear(32, few), nn.Linear(32, 512)

    def forward(self, x):
        return torch.cat([self.gate(x), self.body(x)], -1)


@pytest.mark.parametrize("few", [1, 2, 3, 4])
@pytest.mark.parametrize("tool", ["half", "int8_dynamic", "int4_operators", "int4_dequantized"])
def test_a_few_numbers_are_not_found_by_chance_in_a_large_weight(tool, few, tmp_path):
    torch.manual_seed(0)
    base, x = Gated(few), torch.randn(2, 3, 32) + 0.2
    path = {**tools.PLAIN, **tools.QUANTIZED}[tool](base, (x,), tmp_path / "m.onnx")
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(target_modules="all-linear")), 0.5)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx")
    vectors = torch.cat([vector.detach().double() for vector in onelora.vectors(model).values()])
    after, before = tools.run(tmp_path / "out.onnx", (x,)), tools.run(path, (x,))
    expected = (x.double().sum(-1, keepdim=True) * vectors).numpy()
    rounding = np.finfo(np.float16 if tool == "half" else np.float32).eps * np.abs(after).max()
    np.testing.assert_allclose(after - before, expected, rtol=0, atol=4 * rounding)


@pytest.mark.parametrize("packed", ["qkk", "kqk", "kk", "q-kk"])
def test_numbers_that_are_twice_in_one_weight_are_refused(packed, tmp_path):
    rng = np.random.default_rng(3)
    parts = {name: rng.normal(size=(6, 6)).astype(np.float32) for name in "qk"}
    parts["-"] = -parts["k"]
    weight = np.concatenate([parts[name] for name in packed])
    node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    save_graph(tmp_path / "m.onnx", [node], {"w": weight}, ("x", [2, 6]), ("y", [2, len(weight)]))
    adapter, _ = adapter_of(tmp_path, parts["k"])
    with pytest.raises(ExportError, match=r"0: its numbers are at several places in 'w' \(rows from \d+, rows from"):
        fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


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
    expected = merged_copy(model, torch.float64)(ids).detach().numpy()
    np.testing.assert_allclose(tools.run(tmp_path / "out.onnx", (ids,)), expected, rtol=1e-5, atol=1e-5)
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
    expected = merged_copy(model, torch.float64)(x.double()).detach().numpy()
    np.testing.assert_allclose(tools.run(tmp_path / "out.onnx", (x,)), expected, rtol=1e-5, atol=1e-5)


def test_layers_with_equal_weights_and_no_names_are_refused(tmp_path):
    make = onnx.helper.make_node
    nodes = [make("MatMul", ["x", "w"], ["h"]), make("Tanh", ["h"], ["t"]), make("MatMul", ["t", "w2"], ["y"])]
    weight = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
    save_graph(tmp_path / "m.onnx", nodes, {"w": weight.T.copy(), "w2": weight.T.copy()}, ("x", [2, 6]), ("y", [2, 6]))
    adapter, _ = adapter_of(tmp_path, weight, weight)
    with pytest.raises(ExportError, match="no names tell them apart"):
        fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_vector_whose_layer_the_export_dropped_is_refused_by_name(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
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
    expected = merged_copy(model, torch.float64)(*args).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(tools.run(tmp_path / "out.onnx", args), expected, rtol=1e-5, atol=1e-5)


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


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(768, 96), nn.Linear(96, 16)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize(("base", "size"), [(torch.float32, 1e-7), (torch.float16, 1e-5), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("half", [False, True])
def test_the_same_layers_are_folded_once_however_small_the_vectors_are(base, size, half, tmp_path):
    """A vector of inputs that are positive moves the outputs far, and the weight less than rounding may."""
    torch.manual_seed(0)
    model, x = Two().to(base).eval(), torch.rand(4, 768)
    stored = copy.deepcopy(model).float()
    args: tuple[Any, ...] = (x,)
    if half:
        stored, args = stored.half(), (x.half(),)
    tools.dynamo(stored, args, tmp_path / "m.onnx")
    vectors = {}
    for name, (layer, seed) in {"a": ("a", 1), "again": ("a", 2), "b": ("b", 3)}.items():
        config = onelora.OneLoRAConfig(target_modules=[layer])
        adapted = fill_vectors(onelora.adapt(copy.deepcopy(model), config), size, seed=seed)
        onelora.save_adapter(adapted, tmp_path / f"{name}.safetensors")
        vectors[name] = onelora.vectors(adapted)[layer].detach().double()
    out = tmp_path / "out.onnx"
    fold_onnx(tmp_path / "m.onnx", tmp_path / "a.safetensors", out)
    before = out.read_bytes()
    for name in ("a", "again"):
        with pytest.raises(ExportError, match=r"holds a vector in that weight already \(of a\): fold into the base"):
            fold_onnx(out, tmp_path / f"{name}.safetensors", out)
    assert out.read_bytes() == before
    fold_onnx(out, tmp_path / "b.safetensors", out)  # other layers
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        for merged in (exact, stored):
            for name in ("a", "b"):
                weight = getattr(merged, name).weight
                weight.copy_(weight.double() + vectors[name][:, None])
        plain, want = stored(*args), exact(x.double())
    assert_parity(torch.from_numpy(tools.run(out, args)).to(plain.dtype), want, plain)


def test_a_vector_does_not_go_into_the_head_of_another_adapter(tmp_path):
    torch.manual_seed(0)
    model, x = Two().bfloat16().eval(), torch.rand(4, 768)
    tools.dynamo(copy.deepcopy(model).float(), (x,), tmp_path / "m.onnx")
    head = onelora.OneLoRAConfig(target_modules=["a"], modules_to_save=["b"])
    for name, config in {"head": head, "b": onelora.OneLoRAConfig(target_modules=["b"])}.items():
        adapted = fill_vectors(onelora.adapt(copy.deepcopy(model), config), 1e-4)
        if name == "head":
            with torch.no_grad():
                adapted.b.weight[::3] *= 1.01
        onelora.save_adapter(adapted, tmp_path / f"{name}.safetensors")
    out = tmp_path / "out.onnx"
    fold_onnx(tmp_path / "m.onnx", tmp_path / "head.safetensors", out)
    with pytest.raises(ExportError, match=r"b: the model holds a vector in that weight already \(of head\)"):
        fold_onnx(out, tmp_path / "b.safetensors", out)
