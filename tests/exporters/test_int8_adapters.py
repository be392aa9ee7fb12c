"""One int8 calibration for a set of adapters: folded first, or vectors beside what is quantised."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zoo
from onnxruntime.quantization import QuantFormat, quantize_static

import onelora_compile as onelora
from onelora_compile.errors import ConfigError, StateError
from onelora_compile.exporters import OnnxRunner, bundle, calibration_reader, export_onnx
from onelora_compile.testing import fill_vectors

OPTIONS: dict[str, Any] = {
    "quant_format": QuantFormat.QDQ,
    "op_types_to_quantize": ["MatMul", "Gemm", "Conv"],
    "per_channel": True,
    "extra_options": {"QuantizeBias": False, "ActivationSymmetric": True},
}


@functools.cache
def sources():
    """A model in all modes with a small adapter and a large one."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    model, x = onelora.adapt(zoo.TinyViT().eval()), torch.randn(2, 16, 12)
    files = [folder / "large.safetensors", folder / "small.safetensors"]
    for seed, (file, size) in enumerate(zip(files, (0.3, 0.02), strict=True)):
        onelora.save_adapter(fill_vectors(model, size, seed=seed), file)
    for mode in ("fold", "input", "load", "bank"):
        bank = files if mode == "bank" else ()
        options: dict[str, Any] = {"input_names": ["x"], "dynamic_shapes": ({0: "batch"},), "bank": bank}
        export_onnx(model, (x,), folder / f"{mode}.onnx", adapters=mode, progress=False, **options)
    return folder, files


def inputs(count=8, seed=0):
    generator = np.random.default_rng(seed)
    return [{"x": generator.normal(size=(2, 16, 12)).astype(np.float32)} for _ in range(count)]


def quantized(mode, path, adapters=()):
    folder, _ = sources()
    quantize_static(
        folder / f"{mode}.onnx", path, calibration_reader(folder / f"{mode}.onnx", inputs(), adapters), **OPTIONS
    )
    return OnnxRunner(path)


def error(runner, mode, adapter):
    """Against the model in float32 with the same adapter, on inputs that were not calibrated on."""
    folder, _ = sources()
    plain = OnnxRunner(folder / f"{mode}.onnx")
    if adapter is not None:
        plain, runner = plain.with_adapter(adapter), runner.with_adapter(adapter)
    (expected,), (found,) = plain.run(inputs(1, 9)[0]), runner.run(inputs(1, 9)[0])
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_one_calibration_holds_for_the_set_and_one_adapters_does_not(tmp_path):
    _, (large, small) = sources()
    alone = quantized("input", tmp_path / "alone.onnx")  # with the small one, which it was exported with
    both = quantized("input", tmp_path / "both.onnx", [large])
    assert error(both, "input", large) < 0.1
    assert error(alone, "input", large) > 2 * error(both, "input", large)
    assert error(both, "input", small) < 0.1


def test_a_bank_is_calibrated_with_all_of_its_adapters(tmp_path):
    runner = quantized("bank", tmp_path / "m.onnx")
    assert max(error(runner, "bank", number) for number in (0, 1, -1)) < 0.2
    reader = calibration_reader(sources()[0] / "bank.onnx", inputs(2))
    ids = [one["adapter_ids"].tolist() for one in iter(reader.get_next, None)]
    assert ids == [[-1, -1], [0, 0], [1, 1]] * 2 or ids == [[2, 2], [0, 0], [1, 1]] * 2


@pytest.mark.parametrize("mode", ["fold", "input", "bank"])
def test_vectors_stay_beside_and_the_device_takes_it(mode, tmp_path):
    runner = quantized(mode, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 8
    kinds = {one.name: one.data_type for one in model.graph.initializer}
    if mode != "fold":
        assert {kinds[name] for name in runner.metadata.vectors} == {onnx.TensorProto.FLOAT}
    report = bundle(tmp_path / "m.onnx", tmp_path / "b", shapes={"batch": (1, 2, 4)}, inputs=inputs(1)[0])
    assert report.mode == mode
    assert all(check.passed for check in report.checks)


def test_what_can_not_be_calibrated_is_an_error():
    folder, files = sources()
    with pytest.raises(StateError, match="fold, then quantise"):
        calibration_reader(folder / "load.onnx", inputs())
    with pytest.raises(StateError, match="takes no adapter files"):
        calibration_reader(folder / "fold.onnx", inputs(), files)
    with pytest.raises(ConfigError, match="the model takes"):
        calibration_reader(folder / "fold.onnx", {"y": np.zeros(3)}).get_next()
