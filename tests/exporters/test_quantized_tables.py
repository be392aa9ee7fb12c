"""fold_onnx into what ONNX Runtime's quantize_dynamic makes at its defaults, which quantises embeddings too.

What is looked up in a table of integers goes into MatMulInteger as it is: no op says what its scale is.
"""

import copy
import logging

import numpy as np
import onnx
import onnx_tools as tools
import onnxruntime
import pytest
import torch
from onnx_graphs import assert_arrays, session
from onnxruntime.quantization import QuantType, quantize_dynamic
from quantized_graphs import wrapped
from quantized_storage import Graph
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import fill_vectors, merged_copy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Siblings(nn.Module):
    """Two linears of one embedding, and one of what they give."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.b, self.c = (
            nn.Embedding(40, 24),
            nn.Linear(24, 32),
            nn.Linear(24, 32),
            nn.Linear(32, 9),
        )

    def forward(self, ids):
        x = self.table(ids)
        return self.c(torch.relu(self.a(x)) + self.b(x))


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.head = nn.Embedding(40, 24), nn.Linear(24, 24), nn.Linear(24, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        return self.head(torch.relu(self.a(x)) + x)


class Bert(nn.Module):
    """Words and positions, then a norm."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(40, 24), nn.Embedding(16, 24), nn.LayerNorm(24)
        self.a, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, ids):
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        return self.head(torch.tanh(self.a(x)) + x)


class Gpt(nn.Module):
    """Words and positions, a block that reads them as they are, and a tied head."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(40, 24), nn.Embedding(16, 24)
        self.a, self.b, self.head = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        words, places = self.words(ids), self.places(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(self.a(words + places)) + self.b(words))


class Twice(nn.Module):
    """One linear of the embedding and of what it gives itself."""

    def __init__(self):
        super().__init__()
        self.table, self.a = nn.Embedding(40, 24), nn.Linear(24, 24)

    def forward(self, ids):
        return self.a(torch.relu(self.a(self.table(ids))))


class Scores(nn.Module):
    """One number of each word: a weight of few numbers, of which any others are nearly a multiple."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(40, 24), nn.Linear(24, 1), nn.Linear(24, 3)

    def forward(self, ids):
        return self.a(self.table(ids)) + self.b(self.table(ids))


MODELS = (Siblings, Tied, Bert, Gpt, Twice, Scores)
IDS = torch.arange(14).reshape(2, 7) * 17 % 40


def setup(kind, folder):
    """The base, the path of an adapter of all its linears, and what both compute in float64."""
    torch.manual_seed(0)
    base = kind().eval()
    names = [name for name, one in base.named_modules() if isinstance(one, nn.Linear)]
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(target_modules=names)), 0.3)
    onelora.save_adapter(model, folder / "a.safetensors")
    with torch.no_grad():
        return base, copy.deepcopy(base).double()(IDS).numpy(), merged_copy(model, torch.float64)(IDS).numpy()


def quantised(base, folder, dynamo, opset, **how):
    tools.exported(base, (IDS,), folder / "f.onnx", dynamo=dynamo, input_names=["ids"], opset_version=opset)
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(folder / "f.onnx", folder / "q.onnx", **how)
    finally:
        logging.disable(logging.NOTSET)
    return folder / "q.onnx"


def optimised(path):
    """As ONNX Runtime saves it, with the two scales of each product as one number."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path.with_name("o.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return path.with_name("o.onnx")


def assert_folds(path, plain, exact, folder):
    before = tools.run(path, (IDS,))
    report = fold_onnx(path, folder / "a.safetensors", folder / "out.onnx", progress=False)
    assert {one.how for one in report.folded.values()} == {"branch"}
    rounding = np.abs(before - plain).max() / np.abs(plain).max()
    error, effect = (
        np.abs(found - exact).max() / np.abs(exact).max() for found in (tools.run(folder / "out.onnx", (IDS,)), before)
    )
    assert error < 2 * rounding < 0.1 * effect


def assert_added(before, after, x, vector):
    """One output of two files differs by the update of the inputs x, both float64."""
    plain = before + x.astype(np.float32).sum(-1, keepdims=True) * vector.astype(np.float32)
    assert_arrays(after, before + x.sum(-1, keepdims=True) * vector, plain)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("dynamo", "opset", "how"),
    [
        (False, 17, {}),
        (True, 18, {"per_channel": True}),
        (False, 11, {"per_channel": True, "weight_type": QuantType.QUInt8}),
        (False, 13, {"reduce_range": True}),
        (True, 21, {"weight_type": QuantType.QUInt8, "reduce_range": True}),
    ],
)
def test_what_is_looked_up_in_a_quantised_embedding(kind, dynamo, opset, how, tmp_path):
    base, plain, exact = setup(kind, tmp_path)
    assert_folds(quantised(base, tmp_path, dynamo, opset, **how), plain, exact, tmp_path)


@pytest.mark.parametrize("kind", MODELS[:-1])
@pytest.mark.parametrize("by_channel", [False, True])
def test_scales_that_a_tool_multiplied_into_one(kind, by_channel, tmp_path):
    base, plain, exact = setup(kind, tmp_path)
    path = optimised(quantised(base, tmp_path, False, 17, per_channel=by_channel))
    assert_folds(path, plain, exact, tmp_path)


def test_an_input_that_is_moved_after_it_was_quantised(tmp_path):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(7, 5)

        def forward(self, x):
            return self.a(x), self.b(x.transpose(1, 2))

    torch.manual_seed(0)
    base, x = Moved().eval(), torch.randn(2, 7, 24)
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    tools.exported(base, (x,), tmp_path / "f.onnx", dynamo=False, input_names=["x"], opset_version=17)
    quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx")
    fold_onnx(tmp_path / "q.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    g = Graph(17)
    rounded = g.add("DequantizeLinear", *g.add("DynamicQuantizeLinear", "x", outputs=3))
    g.nodes.append(onnx.helper.make_node("Identity", [rounded], ["o"]))
    onnx.save(wrapped(g, x.numpy(), "main", 17), tmp_path / "rounded.onnx")
    rows = tools.run(tmp_path / "rounded.onnx", (x,)).astype(np.float64).swapaxes(1, 2)
    before, after = (session(tmp_path / name).run(None, {"x": x.numpy()})[1] for name in ("q.onnx", "out.onnx"))
    vector = onelora.vectors(model)["b"].detach().double().numpy()
    assert_added(before, after, rows, vector)


def test_the_scale_of_the_table_is_taken_as_the_file_holds_it(tmp_path):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a = nn.Embedding(40, 24), nn.Linear(24, 32)

        def forward(self, ids):
            return self.a(self.table(ids))

    base, *_ = setup(Single, tmp_path)
    path = quantised(base, tmp_path, False, 17)
    fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    held = {one.name: onnx.numpy_helper.to_array(one).astype(np.float64) for one in onnx.load(path).graph.initializer}
    q, scale, zero = (held[f"table.weight_{part}"] for part in ("quantized", "scale", "zero_point"))
    rows = ((q - zero) * scale)[IDS]
    vector = onelora.read_adapter(tmp_path / "a.safetensors").vectors["a"].double().numpy()
    before, after = (session(one).run(None, {"ids": IDS.numpy()})[0] for one in (path, tmp_path / "out.onnx"))
    assert_added(before, after, rows, vector)
