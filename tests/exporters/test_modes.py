"""The four ways that an ONNX model carries an adapter: each the same function of base and vectors, for two adapters."""

import copy
import json
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from mode_cases import MODES, SWAPPED, Case, Main
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import OnnxRunner, bundle, export_onnx, fold_onnx, verify
from onelora_compile.testing import fill_vectors

DEFAULT = [(name, mode, "float32") for name in ("vit", "bert", "gpt2") for mode in MODES]
DEFAULT += [("bert", mode, "float16") for mode in MODES]
ALL = [
    (name, mode, dtype)
    for name in ("vit", "bert", "gpt2", "llama", "t5", "dit", "flux", "minilm")
    for mode in MODES
    for dtype in ("float32", "float16")
]
CASES = [pytest.param(*one, marks=[] if one in DEFAULT else pytest.mark.slow) for one in ALL]


@pytest.mark.parametrize(("name", "mode", "dtype"), CASES)
def test_two_adapters_against_float64(name, mode, dtype, tmp_path):
    case, dtype = Case(name, tmp_path), getattr(torch, dtype)
    report = case.export(mode, dtype=None if dtype == torch.float32 else dtype)
    assert report.mode == mode
    assert report.vectors == len(case.vectors)
    assert sorted(report.unused) == []
    runner = OnnxRunner(case.path)
    if mode == "bank":
        runner.use("a")
    case.check(runner.run(case.feed(dtype))[0], case.models[0], dtype)
    if mode == "fold":
        return
    before = case.path.read_bytes()
    runner.use(case.files[1])
    case.check(runner.run(case.feed(dtype))[0], case.models[1], dtype)
    if mode == "bank":
        runner.use(None)
        case.check(runner.run(case.feed(dtype))[0], case.base, dtype)
    assert case.path.read_bytes() == before


@pytest.mark.parametrize("mode", SWAPPED)
def test_names_in_the_graph_are_those_of_the_file_and_equal_vectors_stay_apart(mode, tmp_path):
    case = Case("bert", tmp_path)
    for model in case.models:
        for vector in onelora.vectors(model).values():
            vector.data.zero_()
    for model, file in zip(case.models, case.files, strict=True):
        onelora.save_adapter(model, file)
    case.export(mode)
    graph = onnx.load(case.path).graph
    names = {tensor.name for tensor in graph.initializer}
    assert names >= set(case.vectors)
    if mode == "input":
        assert {value.name for value in graph.input} == set(case.inputs) | set(case.vectors)
    readers = [set(node.input) for node in graph.node]
    for name in case.vectors:
        assert sum(name in inputs for inputs in readers) == 1
    if mode != "bank":
        fill_vectors(case.models[1], 0.02)
        onelora.save_adapter(case.models[1], case.files[1])
        runner = OnnxRunner(case.path, case.files[1])
        case.check(runner.run(case.feed(torch.float32))[0], case.models[1], torch.float32)


@pytest.mark.parametrize("mode", ["input", "bank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_feature_sums_are_float32_and_one_for_each_shared_input(mode, dtype, tmp_path):
    case = Case("llama", tmp_path)
    case.export(mode, dtype=dtype)
    model = onnx.shape_inference.infer_shapes(onnx.load(case.path))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    kinds = {node.output[0]: node.op_type for node in model.graph.node}
    sums = [node for node in model.graph.node if node.op_type == "ReduceSum"]
    layers = len({name.split("layers.")[1].split(".")[0] for name in case.vectors})
    assert len(sums) == 4 * layers  # q k v | o | gate up | down
    assert all(types[node.output[0]] == onnx.TensorProto.FLOAT for node in sums)
    assert all(kinds.get(node.input[0]) == "Cast" for node in sums) == (dtype == torch.float16)


def test_fold_is_the_graph_of_the_base_and_load_costs_nothing_after_loading(tmp_path):
    def optimized(path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return sorted(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)

    case = Case("bert", tmp_path)
    export_onnx(Main(case.base), (), tmp_path / "base.onnx", case.inputs)
    base = optimized(tmp_path / "base.onnx")
    for mode in ("fold", "load"):
        case.place(mode)
        assert optimized(case.path) == base


@pytest.mark.slow
def test_weights_that_are_read_directly(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 24)
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    for mode in ("fold", "load", "input"):
        report = export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode)
        assert report.vectors == len(onelora.vectors(model))
    # nn.MultiheadAttention projects [tokens * batch, width]: rows of the batch are not to be told there.
    with pytest.raises(ExportError, match=r"out_proj': its output \[10, 24\] has no axis of the batch size 2"):
        export_onnx(model, (x,), tmp_path / "m.onnx", adapters="bank", bank=[tmp_path / "a.safetensors"])


@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_inputs_are_called_as_those_of_the_base(mode, tmp_path):
    base, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(2, 6)
    export_onnx(base, (x,), tmp_path / "base.onnx")
    model = fill_vectors(onelora.adapt(base), 0.1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    bank = [tmp_path / "a.safetensors"] if mode == "bank" else ()
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode, bank=bank)
    plain, adapted = OnnxRunner(tmp_path / "base.onnx"), OnnxRunner(tmp_path / "m.onnx")
    assert adapted.output_names == plain.output_names
    assert adapted.input_names == plain.input_names


def test_metadata_tells_where_a_model_comes_from(tmp_path):
    case = Case("bert", tmp_path)
    export_onnx(Main(case.base), (), tmp_path / "base.onnx", case.inputs)
    fold_onnx(tmp_path / "base.onnx", case.files[1], tmp_path / "folded.onnx")
    runner = OnnxRunner(tmp_path / "folded.onnx")
    assert runner.mode == "fold"
    assert runner.metadata.adapters == ("b",)
    assert set(runner.metadata.vectors) == set(case.vectors)
    stored = onelora.read_adapter(case.files[1]).fingerprints
    assert all(runner.metadata.fingerprints[name].distance(one) == 0 for name, one in stored.items())
    props = {prop.key: prop.value for prop in onnx.load(tmp_path / "folded.onnx").metadata_props}
    assert set(json.loads(props["onelora.fingerprints"])) == set(case.vectors)
    case.place("load")
    assert OnnxRunner(case.path).metadata.sha256 != runner.metadata.sha256  # another adapter


def test_verify_compares_any_two(tmp_path):
    case = Case("bert", tmp_path)
    case.place("input")
    folded = tmp_path / "f.onnx"
    export_onnx(Main(case.models[1]), (), folded, case.inputs)
    assert not verify(case.path, folded).passed
    assert verify(OnnxRunner(case.path, case.files[1]), folded).passed
    assert verify(folded, Main(case.models[1])).passed
    found = verify(folded, Main(case.models[1]), (), case.inputs)
    assert found.passed
    assert found.inputs == {name: tuple(value.shape) for name, value in case.inputs.items()}
    failed = verify(folded, Main(case.models[0]), {k: v.numpy() for k, v in case.inputs.items()})
    assert not failed.passed
    assert "FAILED" in str(failed)
    with pytest.raises(ExportError, match=r"takes 2 inputs .*; 1 were given"):
        verify(folded, case.path, [case.inputs["input_ids"]])


class Two(torch.nn.Module):
    """An output for each row, and one that is empty for rows of zeros."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        y = self.linear(x)
        return y, y.relu()[:, :0]


def test_a_comparison_of_nothing_is_no_pass(tmp_path):
    model: Any = Two().eval()
    x, batch = torch.randn(2, 4), ({0: "batch"},)
    export_onnx(model, (x,), tmp_path / "m.onnx", dynamic_shapes=batch)
    found = verify(tmp_path / "m.onnx", model, (x,))
    assert found.passed
    assert [one.entries for one in found.parities] == [6, 0]
    assert "empty, nothing compared" in str(found)
    for reference in (model, tmp_path / "m.onnx"):
        with pytest.raises(ExportError, match=r"every output is empty on these inputs .*the first \[0, 3\]"):
            verify(tmp_path / "m.onnx", reference, (x[:0],))
    model.forward = lambda x: model.linear(x)[:, :0]
    with pytest.raises(ExportError, match="so nothing was compared: give inputs with rows"):
        export_onnx(model, (x,), tmp_path / "none.onnx")
    assert not (tmp_path / "none.onnx").exists()
    export_onnx(model, (x,), tmp_path / "none.onnx", verify=False)
    with pytest.raises(ExportError, match="every output is empty on the reference inputs"):
        bundle(tmp_path / "none.onnx", tmp_path / "folder")


def test_numbers_in_the_metadata_that_are_none(tmp_path):
    export_onnx(
        onelora.adapt(nn.Sequential(nn.Linear(3, 2))), (torch.randn(2, 3),), tmp_path / "m.onnx", progress=False
    )
    for change in ({"vectors": '{"a": [Infinity]}'}, {"uses": '{"a": [1, Infinity]}'}):
        model = onnx.load(tmp_path / "m.onnx")
        for prop in model.metadata_props:
            prop.value = change.get(prop.key.removeprefix("onelora."), prop.value)
        onnx.save(model, tmp_path / "damaged.onnx")
        with pytest.raises(onelora.AdapterFileError, match="damaged onelora metadata"):
            OnnxRunner(tmp_path / "damaged.onnx")
