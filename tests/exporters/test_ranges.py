"""ranges(): what a model's values are, and what float16 makes of them."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import save_graph
from torch import nn
from typer.testing import CliRunner

import onelora_compile as onelora
from onelora_compile.cli import app
from onelora_compile.errors import BaseMismatchError, ConfigError, StateError
from onelora_compile.exporters import bundle, export_onnx, ranges
from onelora_compile.testing import fill_vectors


@pytest.fixture
def graph(tmp_path):
    """Y = Relu(x * w) * 1e-6, and a mask with an infinity."""
    made = onnx.helper.make_node
    nodes = [made("Mul", ["x", "w"], ["p"]), made("Relu", ["p"], ["r"]), made("Mul", ["r", "small"], ["s"])]
    nodes += [made("Add", ["s", "mask"], ["y"])]
    arrays = {"w": np.array([1, 10, 1000], np.float32), "small": np.array(1e-6, np.float32)}
    arrays["mask"] = np.array([0, 0, -np.inf], np.float32)
    return save_graph(tmp_path / "m.onnx", nodes, arrays, ("x", ["batch", 3]), ("y", ["batch", 3]))


def test_every_number_is_counted(graph):
    x = np.array([[1, -2, 80], [0.01, 3, 70]], np.float32)
    report = ranges(graph, [{"x": x}, {"x": x / 2}])
    values = np.concatenate([x, x / 2]) * np.array([1, 10, 1000], np.float32)
    p, r, s, y = (report.tensors[name] for name in "prsy")
    assert (p.op, p.dtype, p.largest) == ("Mul", "float32", 80000)
    assert p.beyond == (np.abs(values) > 65504).mean()
    assert p.overflows
    assert not p.broken  # the file has float32
    assert (p.headroom, r.largest) == (65504 / 80000, 80000)
    small = np.maximum(values, 0).astype(np.float32) * np.array(1e-6, np.float32)
    nonzero = small[small > 0]
    assert s.vanished == (nonzero.astype(np.float16) == 0).mean() > 0
    assert s.subnormal == (nonzero < 2.0**-14).mean()
    assert not y.finite
    assert not y.nan
    assert y.largest == p.largest * 0 + max(small[:, 0].max(), small[:, 1].max())
    assert report.tensors["w"].op == "initializer"
    assert list(report.tensors)[-4:] == ["p", "r", "s", "y"]
    assert report.passed
    assert report.worst()[0].name == "p"


@pytest.mark.parametrize("size", [65504, 65510, np.nextafter(np.float32(65520), np.float32(0)), 65520, 65536])
def test_what_float16_rounds_to_infinity_is_beyond_it(graph, size):
    """A mask of -65504 with a score added is not: it is rounded back."""
    x = np.array([[size, 0, 0]], np.float32)
    p = ranges(graph, [{"x": x}]).tensors["p"]
    with np.errstate(over="ignore"):
        assert p.overflows == (p.beyond > 0) == np.isinf(np.float16(x[0, 0]))


def test_a_float16_file_is_measured_as_float32_would_be(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(5, 8)
    nn.init.normal_(next(model.parameters()), std=3)
    export_onnx(model, (x,), tmp_path / "m.onnx", dtype=torch.float16, input_names=["x"], progress=False)
    half = model.half().double()
    large = (x * 9000).half()
    report = ranges(tmp_path / "m.onnx", [{"x": large.numpy()}])
    expected = half[0](large.double()).abs().max().item()
    assert expected > 65504
    (found,) = [one for one in report.tensors.values() if one.op == "Gemm" and one.name != "output"]
    assert found.largest == pytest.approx(expected, rel=1e-3)
    assert found.broken
    assert not report.passed
    assert ranges(tmp_path / "m.onnx", {"x": x.half().numpy()}).passed


@pytest.mark.parametrize("mode", ["base", "input", "load", "bank"])
def test_before_and_after_an_adapter(mode, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(5, 8)
    plain = model[0](x).abs().max().item()
    if mode == "base":
        export_onnx(model, (x,), tmp_path / "m.onnx", input_names=["x"], progress=False)
    onelora.adapt(model)
    onelora.save_adapter(fill_vectors(model, 50.0), tmp_path / "a.safetensors")
    adapted = model[0](x).abs().max().item()
    options: dict[str, Any] = {"adapters": mode, "bank": [tmp_path / "a.safetensors"] if mode == "bank" else []}
    if mode != "base":
        export_onnx(model, (x,), tmp_path / "m.onnx", input_names=["x"], progress=False, **options)
    adapter = tmp_path / "a.safetensors" if mode == "base" else None
    report = ranges(tmp_path / "m.onnx", [{"x": x.numpy()}], adapter)
    relus = [one for one in report.tensors.values() if one.op == "Relu"]
    after = max(one.largest for one in report.tensors.values() if one.op in ("Gemm", "Add", "MatMul"))
    assert after >= adapted * (1 - 1e-5)
    assert len(relus) == 1
    if mode != "bank":
        largest = max(one.largest for name, one in report.before.items() if one.op == "Relu")
        assert largest <= plain * (1 + 1e-5) < adapted
        assert relus[0].largest > largest


def test_mistakes_are_named(graph, tmp_path):
    with pytest.raises(ConfigError, match="there are no inputs to measure ranges on"):
        ranges(graph, [])
    with pytest.raises(ConfigError, match=r"names \['z'\]; the model takes \['x'\]"):
        ranges(graph, {"z": np.zeros((1, 3), np.float32)})
    with pytest.raises(ConfigError, match="an input to measure ranges on has NaN in 'x'"):
        ranges(graph, {"x": np.array([[1, np.nan, 2]], np.float32)})
    model, x = onelora.adapt(nn.Sequential(nn.Linear(8, 4))), torch.randn(5, 8)
    onelora.save_adapter(fill_vectors(model, 0.1), tmp_path / "a.safetensors")
    export_onnx(model, (x,), tmp_path / "f.onnx", input_names=["x"], progress=False)
    with pytest.raises(BaseMismatchError):  # it holds an adapter already
        ranges(tmp_path / "f.onnx", {"x": x.numpy()}, tmp_path / "a.safetensors")


def test_a_file_without_values_for_its_vectors_is_given_an_adapter(tmp_path):
    model, x = onelora.adapt(nn.Sequential(nn.Linear(8, 4))), torch.randn(5, 8)
    onelora.save_adapter(fill_vectors(model, 0.1), tmp_path / "a.safetensors")
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters="input", input_names=["x"], progress=False)
    bundle(tmp_path / "m.onnx", tmp_path / "b", progress=False)
    with pytest.raises(StateError, match="give adapter="):
        ranges(tmp_path / "b" / "model.onnx", {"x": x.numpy()})
    report = ranges(tmp_path / "b" / "model.onnx", {"x": x.numpy()}, tmp_path / "a.safetensors")
    whole = ranges(tmp_path / "m.onnx", {"x": x.numpy()})
    largest = [max(one.largest for one in each.tensors.values()) for each in (report, whole)]
    assert largest[0] == pytest.approx(largest[1], rel=1e-6)


def test_the_command_line_shows_it_and_fails_where_float16_overflows(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(5, 8)
    nn.init.normal_(next(model.parameters()), std=3)
    export_onnx(model, (x,), tmp_path / "m.onnx", dtype=torch.float16, input_names=["x"], progress=False)
    np.savez(tmp_path / "a.npz", x=x.half().numpy())
    np.savez(tmp_path / "b.npz", x=(x * 9000).half().numpy())
    done = CliRunner().invoke(app, ["ranges", str(tmp_path / "m.onnx"), str(tmp_path / "a.npz")])
    assert done.exit_code == 0, done.output
    assert "headroom" in done.output
    files = [str(tmp_path / name) for name in ("a.npz", "b.npz")]
    done = CliRunner().invoke(app, ["ranges", str(tmp_path / "m.onnx"), *files])
    assert done.exit_code == 1
    assert "OVERFLOWS" in done.output
