"""One int8 calibration for a set of adapters: folded first, or vectors beside what is quantised."""

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zoo
from by_modelopt import by_modelopt
from onnxruntime.quantization import QuantFormat, quantize_static

import onelora_compile as onelora
from onelora_compile.errors import ConfigError, StateError
from onelora_compile.exporters import OnnxRunner, bundle, calibration_reader, export_onnx, fold_onnx
from onelora_compile.exporters.onnx_runtime.calibration_reader import CalibrationReader
from onelora_compile.testing import fill_vectors

OPTIONS: dict[str, Any] = {
    "quant_format": QuantFormat.QDQ,
    "op_types_to_quantize": ["MatMul", "Gemm", "Conv"],
    "per_channel": True,
    "extra_options": {"QuantizeBias": False, "ActivationSymmetric": True},
}


@functools.cache
def sources():
    """A model in all modes with a small adapter and a large one, and its base."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    model, x = zoo.TinyViT().eval(), torch.randn(2, 16, 12)
    torch.onnx.export(
        model, (x,), folder / "base.onnx", input_names=["x"], dynamic_shapes=({0: "batch"},), verbose=False
    )
    onelora.adapt(model)
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


TOOLS: dict[str, Any] = {
    "onnxruntime": functools.partial(quantize_static, **OPTIONS),
    "modelopt": by_modelopt,
    "modelopt, fp8": functools.partial(by_modelopt, kind="fp8"),
}
NEEDS_MODELOPT = [  # it is looked for and not imported: that changes onnxruntime's quantiser
    pytest.mark.runtimes,
    pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed"),
]
WITH = [pytest.param(name, marks=NEEDS_MODELOPT if "modelopt" in name else []) for name in TOOLS]


def quantized(mode, path, adapters=(), tool="onnxruntime"):
    source = sources()[0] / f"{mode}.onnx"
    TOOLS[tool](source, path, calibration_reader(source, inputs(), adapters))
    return OnnxRunner(path)


def error(runner, mode, adapter, folder=None):
    """Against the model in float32 with the same adapter, on inputs that were not calibrated on."""
    plain = OnnxRunner((folder or sources()[0]) / f"{mode}.onnx")
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


@pytest.mark.parametrize("tool", WITH)
def test_a_bank_is_calibrated_with_all_of_its_adapters(tool, tmp_path):
    runner = quantized("bank", tmp_path / "m.onnx", tool=tool)
    assert max(error(runner, "bank", number) for number in (0, 1, -1)) < 0.2


def test_a_reader_gives_every_adapter_to_every_input():
    reader = calibration_reader(sources()[0] / "bank.onnx", inputs(2))
    first: Any = reader.get_first()
    assert first["adapter_ids"].tolist() == [-1, -1]
    ids = [one["adapter_ids"].tolist() for one in iter(reader.get_next, None)]
    assert ids == [[-1, -1], [0, 0], [1, 1]] * 2
    assert reader.get_first() is None


@pytest.mark.parametrize("tool", WITH)
def test_a_quantised_base_takes_an_adapter_and_wider_ranges(tool, tmp_path):
    """As right as what is folded first and quantised then."""
    folder, (large, _) = sources()
    fold_onnx(folder / "base.onnx", large, tmp_path / "folded.onnx")
    for source in (folder / "base.onnx", tmp_path / "folded.onnx"):
        TOOLS[tool](source, tmp_path / f"{source.stem}8.onnx", CalibrationReader(iter(inputs())))
    fold_onnx(tmp_path / "base8.onnx", large, tmp_path / "m.onnx", calibration=inputs())
    assert error(OnnxRunner(tmp_path / "m.onnx"), "folded", None, tmp_path) < 2 * error(
        OnnxRunner(tmp_path / "folded8.onnx"), "folded", None, tmp_path
    )


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
