"""Another adapter in a model that is exported: by file, by run and by thread, and what may not be swapped."""

import copy
import threading

import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from mode_cases import SWAPPED, Case, Main

import onelora_compile as onelora
from onelora_compile.errors import AdapterFileError, BaseMismatchError, ConfigError, ExportError, StateError
from onelora_compile.exporters import OnnxRunner, convert_adapter, export_onnx
from onelora_compile.testing import fill_vectors


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
    case.place("input")
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


@pytest.mark.parametrize("mode", SWAPPED)
def test_threads_with_different_adapters(mode, tmp_path):
    case = Case("bert", tmp_path)
    case.place(mode)
    first = OnnxRunner(case.path)
    runners = [first.with_adapter(file) for file in case.files]
    expected = [runner.run(case.feed(torch.float32))[0] for runner in runners]
    assert not np.array_equal(expected[0], expected[1])
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
    case.place(mode)
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
    case.place(mode)
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
    case.place("fold")
    with pytest.raises(StateError, match="in its weights"):
        OnnxRunner(case.path).use(case.files[1])
    with pytest.raises(StateError, match="is no bank"):
        OnnxRunner(case.path).run(case.feed(torch.float32), adapter_ids=[0, 0])
    with pytest.raises(StateError, match="needs an adapted model"):
        export_onnx(Main(case.base), (), case.path, case.inputs, adapters="load")
    with pytest.raises(ConfigError, match="needs bank"):
        export_onnx(Main(case.models[0]), (), case.path, case.inputs, adapters="bank")
    case.place("bank")
    with pytest.raises(ExportError, match="has no adapter 'c'; it has a, b"):
        OnnxRunner(case.path).use("c")


def test_conversions_that_lack_something_say_what(tmp_path):
    case = Case("bert", tmp_path)
    case.place("load")
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
