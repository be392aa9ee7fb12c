"""Bundles in float16: what overflows is refused; the device names NaN, infinity, constants, and where they start."""

import json
import sys
from typing import Any

import bundles
import cudart_double
import half_models
import numpy as np
import onnx
import pytest
import tensorrt_double
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import bundle, export_onnx
from onelora_compile.testing import fill_vectors

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")
HALF: dict[str, Any] = {"dtype": torch.float16, "progress": False}


class Block(nn.Module):
    """A residual block whose inner values grow with its input."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        y = self.first(x)
        return self.last(self.norm(y * y))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Block in float16 in all modes, and files: one adapter that keeps it in range, one that does not."""
    folder = tmp_path_factory.mktemp("half")
    torch.manual_seed(0)
    model, x = onelora.adapt(Block().eval()), torch.randn(3, 8)
    onelora.save_adapter(fill_vectors(model, 300.0), folder / "wild.safetensors")
    onelora.save_adapter(fill_vectors(model, 0.1), folder / "tame.safetensors")
    for mode in ("fold", "input", "load"):
        export_onnx(model, (x,), folder / f"{mode}.onnx", adapters=mode, input_names=["x"], **HALF)
    files = [folder / "tame.safetensors", folder / "wild.safetensors"]
    options: dict[str, Any] = {"input_names": ["x"], "adapters": "bank", "bank": files, **HALF}
    export_onnx(model, (x,), folder / "bank.onnx", **options, verify=False)
    return folder


def inputs(scale=1.0):
    return {"x": (np.random.default_rng(0).normal(size=(3, 8)) * scale).astype(np.float16)}


@pytest.mark.parametrize("jetpack", ["6.2", "5.1"])
def test_values_that_overflow_on_the_inputs_are_refused_by_name(jetpack, sources, tmp_path):
    bundle(sources / "fold.onnx", tmp_path / "a", jetpack=jetpack, inputs=inputs())
    with pytest.raises(ExportError, match=r"the first is '\w+' \(Mul\), up to \S+, of 65504.*keep_float32='auto'"):
        bundle(sources / "fold.onnx", tmp_path / "b", jetpack=jetpack, inputs=inputs(900.0))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("mode", ["input", "load", "refit"])
def test_every_adapter_of_the_bundle_is_measured(mode, sources, tmp_path):
    source, swap = sources / f"{'input' if mode == 'refit' else mode}.onnx", "refit" if mode == "refit" else "auto"
    options: dict[str, Any] = {"inputs": inputs(), "swap": swap, "jetpack": "6.2"}
    bundle(source, tmp_path / "a", adapters=[sources / "tame.safetensors"], **options)
    with pytest.raises(ExportError, match="float16 can't hold"):
        bundle(source, tmp_path / "b", adapters=[sources / "wild.safetensors"], **options)


def test_every_adapter_of_a_bank_is_measured(sources, tmp_path):
    with pytest.raises(ExportError, match="float16 can't hold"):
        bundle(sources / "bank.onnx", tmp_path / "b", inputs=inputs())


def test_what_keep_float32_makes_of_it_is_bundled(tmp_path):
    model, x = half_models.made("siglip")
    fill_vectors(onelora.adapt(model), 0.02)
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters="input", keep_float32="auto", **HALF)
    report = bundle(tmp_path / "m.onnx", tmp_path / "b", inputs={"x": x.half().numpy()})
    assert report.checks
    assert all(check.passed for check in report.checks)
    values = json.loads((tmp_path / "b" / "manifest.json").read_text())["model"]["values"]
    assert max(one["largest"] for one in values) > 65504
    assert all(one["dtype"] == "float32" for one in values if one["largest"] > 65504)


def test_weak_typing_is_told_what_float16_can_not_hold(tmp_path):
    model, x = half_models.made("siglip")
    export_onnx(model, (x,), tmp_path / "m.onnx", progress=False)
    report = bundle(tmp_path / "m.onnx", tmp_path / "b", jetpack="6.0", weak_fp16=True, inputs={"x": x.numpy()})
    assert any("beyond float16" in note and "TensorRT may choose float16" in note for note in report.notes)


def set_constant(name, value):
    def changed(model):
        tensor = next(one for one in model.graph.initializer if one.name == name)
        numbers = np.full_like(onnx.numpy_helper.to_array(tensor), value)
        tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, name))

    return changed


@pytest.fixture
def built(sources, tmp_path, monkeypatch):
    """A bundle with an engine, and its command line."""
    bundle(sources / "fold.onnx", tmp_path / "b", inputs=inputs())
    cudart = cudart_double.compile_cudart(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.module(rtx))

    def call(*args):
        return bundles.run(tmp_path / "b", "--libcudart", cudart, *args)

    assert call("build") == 0
    assert call("selftest") == 0
    return tmp_path / "b", call


@pytest.mark.parametrize(
    ("weight", "value", "said"),
    [
        ("last.bias", np.nan, "12 of 12 entries are NaN"),
        ("last.bias", np.inf, "12 of 12 entries are infinite"),
        ("norm.weight", 0.0, "output 'output'"),
    ],
)
def test_the_self_test_names_what_an_output_is(weight, value, said, built, capsys):
    folder, call = built
    capsys.readouterr()
    bundles.change_engines(folder, set_constant(weight, value))
    if weight == "norm.weight":  # the head's bias alone is left, and that is zero: one class everywhere
        bundles.change_engines(folder, set_constant("norm.bias", 0.0))
        bundles.change_engines(folder, set_constant("last.bias", 0.25))
        said = "all 12 entries are 0.25"
    assert call("selftest") == 1
    text = capsys.readouterr().out
    assert said in text
    assert "output 'output' with adapter 'folded': " in text
    assert "selftest --layers" in text


def test_layers_finds_where_it_starts(built, capsys, monkeypatch):
    _, call = built
    real = onnx.load_model_from_string

    def broken(content):
        """A builder that gets one product wrong."""
        model = real(content)
        for node in model.graph.node:
            if node.op_type == "Mul":
                model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([np.inf], np.float16), "fault"))
                node.input[1] = "fault"
        return model

    monkeypatch.setattr(onnx, "load_model_from_string", broken)
    assert call("build", "--force") == 0
    capsys.readouterr()
    assert call("selftest", "--layers") == 1
    text = capsys.readouterr().out
    assert "starts at " in text
    assert "(Mul): 48 of 48 entries are infinite; the value before it, " in text


def test_layers_tells_when_the_inner_values_are_right(built, capsys):
    folder, call = built
    bundles.change_engines(folder, set_constant("last.bias", 5.0))
    capsys.readouterr()
    assert call("selftest", "--layers") == 1  # the engine that it builds is as the model is
    assert "inner values are right in an engine that has them as outputs" in capsys.readouterr().out


def test_layers_is_for_an_engine(built, capsys):
    folder, _ = built
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tolerance"] = {"output": -1.0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert bundles.call(folder, "selftest", "--layers") == 1
    assert "--layers builds an engine" in capsys.readouterr().err
