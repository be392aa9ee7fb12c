"""export_onnx: the folded graph is the base's, and its numbers are the adapted model's."""

import copy
import os
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.passes.exported.fold_vectors import fold_vectors
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

DYNAMIC = {
    "tiny_vit": {"x": {0: "batch"}},
    "bert": {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}},
}


class Logits(nn.Module):
    """The logits alone, so that every model has one output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return zoo.logits(self.model(**inputs))


def run_onnx(path, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (v.numpy() for v in inputs.values()), strict=True)))[0])


def assert_exports(model, args, folder):
    error = export_onnx(model, args, folder / "a.onnx").error
    assert error is not None
    assert error < 1e-4


def op_types(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_folded_model_is_the_base_graph_with_the_adapted_numbers(name, tmp_path):
    base, inputs = zoo.MODELS[name]()
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    before = copy.deepcopy(model.state_dict())
    report = export_onnx(Logits(model), (), tmp_path / "a.onnx", kwargs=inputs)
    assert report.parity is not None
    assert report.error is not None
    assert report.error < 1e-4
    assert len(report.losses) == zoo.SITES[name] - len(report.unused)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    reference = zoo.logits(merged_copy(model, torch.float64)(**wide)).detach()
    plain = zoo.logits(merged_copy(model)(**inputs)).detach()
    assert_parity(run_onnx(tmp_path / "a.onnx", inputs), reference, plain, factor=4, floor=16)

    export_onnx(Logits(base), (), tmp_path / "base.onnx", kwargs=inputs)
    assert op_types(tmp_path / "a.onnx") == op_types(tmp_path / "base.onnx")
    onnx.checker.check_model(str(tmp_path / "a.onnx"))


@pytest.mark.parametrize("name", ["tiny_vit", "gpt2"])
def test_the_program_has_not_one_node_more_than_the_base(name):
    base, inputs = zoo.MODELS[name]()
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    with torch.no_grad():
        plain = torch.export.export(Logits(base), (), inputs)
        adapted = torch.export.export(Logits(model), (), inputs)
        folded, result = fold_vectors(adapted)
    assert [node.target for node in folded.graph.nodes if node.op != "placeholder"] == [
        node.target for node in plain.graph.nodes if node.op != "placeholder"
    ]
    tied = 1 if name == "gpt2" else 0  # transformers registers the tied head under two names
    assert abs(len(folded.graph.nodes) - len(plain.graph.nodes)) <= tied
    assert len(result.losses) == zoo.SITES[name]
    assert not any("onelora" in key for key in folded.state_dict)
    torch.testing.assert_close(folded.module()(**inputs), zoo.logits(model(**inputs)), rtol=1e-4, atol=1e-5)
    # The given program still is the adapted one.
    torch.testing.assert_close(adapted.module()(**inputs), zoo.logits(model(**inputs)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_shapes(name, tmp_path):
    model, inputs = zoo.MODELS[name]()
    fill_vectors(onelora.adapt(model))
    export_onnx(model, (), tmp_path / "a.onnx", kwargs=inputs, dynamic_shapes=DYNAMIC[name])
    bigger = {k: torch.cat([v, v, v]) for k, v in inputs.items()}
    if name == "bert":
        bigger = {k: torch.cat([v, v], 1) for k, v in bigger.items()}
    expected = zoo.logits(model(**bigger))
    torch.testing.assert_close(run_onnx(tmp_path / "a.onnx", bigger), expected, rtol=1e-4, atol=1e-4)
    shape = onnx.load(tmp_path / "a.onnx").graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param == "batch"


def test_training_mode_and_a_compiled_model_are_exported_in_evaluation_mode_and_left_alone(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 2))
    fill_vectors(onelora.adapt(model), 0.5)
    model[2].eval()
    compiled: Any = torch.compile(model, backend="onelora", options={"inner": "eager"})
    x = torch.randn(4, 8)
    export_onnx(compiled, (x,), tmp_path / "a.onnx")
    assert [module.training for module in model] == [True, True, False, True]
    assert "Dropout" not in op_types(tmp_path / "a.onnx")
    torch.testing.assert_close(run_onnx(tmp_path / "a.onnx", {"x": x}), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_model_compiled_in_place(tmp_path):
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    model.compile(backend="onelora", options={"inner": "eager"})
    x = torch.randn(4, 8)
    model(x)
    assert_exports(model, (x,), tmp_path)


def test_shared_weights_are_folded_per_use(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.one, self.two = nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.one.weight = self.two.weight = self.embed.weight

        def forward(self, ids):
            return self.two(self.one(self.embed(ids))) + self.one(self.embed(ids))

    model = fill_vectors(onelora.adapt(Shared()), 0.5)
    ids = torch.arange(6)
    report = export_onnx(model, (ids,), tmp_path / "a.onnx")
    assert set(report.losses) == {"one", "two"}
    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "a.onnx").graph.initializer]
    table = model.embed.weight.detach().numpy()
    assert any(t.shape == table.shape and np.array_equal(t, table) for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype, tmp_path):
    model = fill_vectors(onelora.adapt(zoo.MLP().to(dtype)), 0.1)
    x = torch.randn(4, 8, dtype=dtype)
    report = export_onnx(model, (x,), tmp_path / "a.onnx")
    assert report.parity is not None
    assert report.parity.output
    assert {t.data_type for t in onnx.load(tmp_path / "a.onnx").graph.initializer} <= {
        onnx.helper.np_dtype_to_tensor_dtype(np.dtype(str(dtype).removeprefix("torch.")))
    }


def test_opset_and_report(tmp_path):
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    report = export_onnx(model, (torch.randn(4, 8),), tmp_path / "a.onnx", opset_version=18)
    assert report.opset_version == 18 == onnx.load(tmp_path / "a.onnx").opset_import[0].version
    assert report.bytes == (tmp_path / "a.onnx").stat().st_size
    for part in ("a.onnx", "18", "vectors folded", "passed"):
        assert part in str(report)


@pytest.mark.parametrize("mode", ["fold", "input"])
def test_the_oldest_opset_is_written_and_older_ones_are_refused(mode, tmp_path):
    base, inputs = zoo.MODELS["gpt2"]()
    model = fill_vectors(onelora.adapt(base))
    report = export_onnx(Logits(model), (), tmp_path / "a.onnx", inputs, adapters=mode, opset_version=17)
    assert report.opset_version == 17 == onnx.load(tmp_path / "a.onnx").opset_import[0].version
    onnx.checker.check_model(str(tmp_path / "a.onnx"))
    for wrong, error in ((16, onelora.ConfigError), (99, onelora.ExportError)):
        with pytest.raises(error, match=f"{wrong}"):
            export_onnx(Logits(model), (), tmp_path / "b.onnx", inputs, opset_version=wrong)
    assert not (tmp_path / "b.onnx").exists()


def test_unused_vectors_are_reported(tmp_path):
    class Net(zoo.MLP):
        def forward(self, x):
            return self.a(x)

    report = export_onnx(onelora.adapt(Net()), (torch.randn(4, 8),), tmp_path / "a.onnx")
    assert report.unused == ["b", "c"]


def test_a_base_without_adapter_is_exported_as_it_is(tmp_path):
    report = export_onnx(zoo.MLP(), (torch.randn(4, 8),), tmp_path / "a.onnx")
    assert report.losses == {}


def test_external_data_replaced_together(tmp_path):
    model = fill_vectors(onelora.adapt(zoo.TinyViT()), 0.02)
    x = torch.randn(2, 16, 12)
    path = tmp_path / "a.onnx"
    report = export_onnx(model, (x,), path, external_data=True)
    assert [file.name for file in report.files] == ["a.onnx", "a.onnx.data"]
    fill_vectors(model, 0.02, seed=4)
    again = export_onnx(model, (x,), path, external_data=True)
    assert len(os.listdir(tmp_path)) == 2
    assert again.files[1].name in os.listdir(tmp_path)
    torch.testing.assert_close(run_onnx(path, {"x": x}), model(x), rtol=1e-4, atol=1e-5)
    (tmp_path / "a.onnx.notes.data").write_text("mine")
    export_onnx(model, (x,), path)
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "a.onnx.notes.data"]


def test_a_single_tensor_is_taken_as_the_only_argument(tmp_path):
    assert_exports(onelora.adapt(zoo.MLP()), torch.randn(4, 8), tmp_path)


@pytest.mark.slow
def test_above_two_gigabytes(tmp_path):
    model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(9)))  # 2.4 GB
    with torch.no_grad():
        for layer in model:
            layer.get_parameter("weight").mul_(0.5)
    fill_vectors(onelora.adapt(model), 1e-4)
    report = export_onnx(model, (torch.randn(1, 8192),), tmp_path / "a.onnx")
    assert report.bytes > 2**31
    assert [file.name for file in report.files] == ["a.onnx", "a.onnx.data"]
