"""A use of a weight that a tool computed into a constant: the file is refused by name, or all uses are folded."""

import dataclasses

import numpy as np
import onnx_tools as tools
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.exporters import OnnxRunner, convert_adapter, export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors, merged_copy
from onelora_compile.weights.adapter_file import read_adapter


def padded(x):
    return F.pad(x, (0, 8 - x.shape[-1]))


# Uses of the weight of `a` besides its call on the input; `b` is called once more, on its output.
CONSTANT = {
    "called_on_a_buffer": lambda s, x: x @ s.a(s.table).T @ s.table,
    "called_on_a_parameter": lambda s, x: x @ s.a(s.learned).T @ s.table,
    "called_in_a_block": lambda s, x: s.block(s.table).sum(0) + s.block(x),
    "by_a_method": lambda s, x: x @ s.product(s.table).T @ s.product(s.table),
    "in_a_loop": lambda s, x: sum(s.a(one).mean(0) for one in (x, s.table)),
    "by_another_name": lambda s, x: (lambda layer: layer(s.table).sum(0))(s.a) + x,
    "by_a_sibling": lambda s, x: s.sibling(x),
    "in_a_list": lambda s, x: sum(layer(s.table).sum(0) for layer in s.list) + x,
    "rows": lambda s, x: padded(F.linear(x, s.a.weight[:4])),
    "columns": lambda s, x: F.linear(x[:, :4], s.a.weight[:, :4]),
    "one_row": lambda s, x: x * s.a.weight[0],
    "sum_of_rows": lambda s, x: x.sum(-1, True) * s.a.weight.sum(1),
    "norm": lambda s, x: x / s.a.weight.norm(),
    "normalised": lambda s, x: F.linear(x, F.normalize(s.a.weight)),
    "triangle": lambda s, x: F.linear(x, s.a.weight.triu()),
    "sum_of_two": lambda s, x: F.linear(x, s.a.weight + s.b.weight),
    "product_of_two": lambda s, x: F.linear(x, s.b.weight @ s.a.weight),
    "reshaped": lambda s, x: F.linear(x, s.a.weight.reshape(4, 16)[:, :8].repeat(2, 1)),
}
FOLLOWED = {
    "called_twice": lambda s, x: s.a(x.sin()),
    "transposed": lambda s, x: F.linear(x, s.a.weight.T),
    "scaled": lambda s, x: F.linear(x, s.a.weight * 0.5),
    "negative": lambda s, x: F.linear(x, -s.a.weight),
    "stacked": lambda s, x: F.linear(x, torch.cat([s.a.weight, s.b.weight]))[:, :8],
    "the_same_again": lambda s, x: s.a(x) + s.a(x),
    "dropped": lambda s, x: (s.a(x.cos()), x)[1],
    "made_like_it": lambda s, x: x + torch.zeros_like(s.a.weight)[0],
    "asked_for_its_dtype": lambda s, x: x.to(s.a.weight.dtype) * s.a.weight.shape[0],
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.inner(x))


class Sibling(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.models = [model.a]
        self.register_buffer("table", model.table)

    def forward(self, x):
        return x + self.models[0](self.table).sum(0)


class Model(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.block, self.use = nn.Linear(8, 8), nn.Linear(8, 8), Block(), use
        self.register_buffer("table", torch.randn(4, 8))
        self.learned = nn.Parameter(torch.randn(4, 8))
        self.sibling, self.list = Sibling(self), nn.ModuleList([self.a])

    def product(self, x):
        return torch.tanh(self.a(x))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) + self.use(self, x) + self.block(x)))


def adapted(use, folder):
    torch.manual_seed(0)
    base, x = Model(use).eval(), torch.randn(5, 8)
    model = merged_copy(base)
    model.use = use
    fill_vectors(onelora.adapt(model), 0.3)
    onelora.save_adapter(model, folder / "a.safetensors")
    return base, model, x


def merged(model, x):
    """With W + b 1ᵀ in the weights, in float64."""
    return merged_copy(model, torch.float64)(x.double()).detach().numpy()


def run(path, x):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


WRITERS = {
    "torchscript": lambda model, x, path: tools.torchscript(model, (x,), path),
    "dynamo": lambda model, x, path: torch.onnx.export(model, (x,), path, dynamo=True, verbose=False),
    "own": lambda model, x, path: export_onnx(model, (x,), path),
}


@pytest.mark.parametrize(
    "writer", ["torchscript", *(pytest.param(one, marks=pytest.mark.slow) for one in ("dynamo", "own"))]
)
@pytest.mark.parametrize("name", [*CONSTANT, *FOLLOWED])
def test_a_file_gets_the_whole_function_or_an_error(name, writer, tmp_path):
    base, model, x = adapted((CONSTANT | FOLLOWED)[name], tmp_path)
    WRITERS[writer](base, x, tmp_path / "base.onnx")
    out, refusal = tmp_path / "out.onnx", ""
    try:
        fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", out, progress=False)
    except ExportError as error:
        refusal = str(error)
    if name in CONSTANT and refusal:
        assert any(f"'{one}'" in refusal or f"{one}:" in refusal for one in ("a", "block.inner"))
        assert not out.exists()
        return
    assert not refusal
    np.testing.assert_allclose(run(out, x), merged(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTANT)
def test_the_export_of_the_adapted_model_is_right(name, tmp_path):
    _, model, x = adapted(CONSTANT[name], tmp_path)
    export_onnx(model, (x,), tmp_path / "m.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), merged(model, x), rtol=1e-5, atol=1e-5)


def test_what_the_file_leaves_out_can_be_allowed(tmp_path):
    base, _, x = adapted(lambda s, x: s.a(s.table).sum(0), tmp_path)
    export_onnx(base, (x,), tmp_path / "base.onnx")
    out, adapter = tmp_path / "out.onnx", tmp_path / "a.safetensors"
    with pytest.raises(ExportError, match=r"fewer uses .* 'a' 1 of 2\..*on_missing_uses='allow'"):
        fold_onnx(tmp_path / "base.onnx", adapter, out, progress=False)
    report = fold_onnx(tmp_path / "base.onnx", adapter, out, progress=False, on_missing_uses="allow")
    assert report.missing_uses == {"a": (1, 2)}
    assert "a 1 of 2" in str(report)
    with pytest.raises(ConfigError, match="on_missing_uses='skip' is not one of 'error', 'allow'"):
        fold_onnx(tmp_path / "base.onnx", adapter, out, on_missing_uses="skip")


def test_a_use_that_hangs_on_an_argument_is_reported(tmp_path):
    class Optional(Model):
        def forward(self, x, context=None):
            y = super().forward(x)
            return y if context is None else y + self.a(context)

    torch.manual_seed(0)
    model, x = Optional(lambda s, x: x).eval(), torch.randn(5, 8)
    export_onnx(model, (x,), tmp_path / "base.onnx")
    fill_vectors(onelora.adapt(model), 0.3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    report = fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    np.testing.assert_allclose(run(tmp_path / "out.onnx", x), merged(model, x), rtol=1e-5, atol=1e-5)
    assert report.missing_uses == {"a": (1, 2)}


def test_the_count_travels_with_the_adapter(tmp_path):
    base, model, x = adapted(CONSTANT["rows"], tmp_path)
    path = tmp_path / "a.safetensors"
    assert read_adapter(path).uses == {"a": (2, 2)}
    again = onelora.load_adapter(base, path)
    onelora.save_adapter(again, tmp_path / "b.safetensors")
    assert read_adapter(tmp_path / "b.safetensors").uses == {"a": (2, 2)}
    export_onnx(model, (x,), tmp_path / "input.onnx", adapters="input")
    OnnxRunner(tmp_path / "input.onnx", path)
    convert_adapter(path, tmp_path / "a.onnx_adapter")
    convert_adapter(tmp_path / "a.onnx_adapter", tmp_path / "c.safetensors", tmp_path / "input.onnx")
    assert read_adapter(tmp_path / "c.safetensors").uses == {"a": (2, 2)}
    older = dataclasses.replace(read_adapter(path), uses={})  # as a version without it wrote
    assert older.vectors.keys() == read_adapter(path).vectors.keys()
