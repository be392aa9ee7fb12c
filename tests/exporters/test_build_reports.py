"""What build_engine says of an engine: manifest, losses by rounding, float16's range, NVIDIA's warnings."""

import dataclasses
import json

import engines
import onnx_ir as ir
import pytest
import torch
from engines import OPTIONS, linear_model

import onelora_compile as onelora
from onelora_compile.exporters import build_engine, export_onnx
from onelora_compile.exporters.tensorrt.manifest import Manifest

pytest.importorskip("tensorrt_rtx_bindings")


def test_rounding_that_loses_vectors_is_reported(tmp_path):
    """float16 can't tell W + b from W where b is far below its step."""
    path, model = engines.linear(tmp_path, "load", torch.float16, scale=1e-6)
    report = build_engine(path, tmp_path / "m.engine", shapes={"batch": (1, 4, 8)}, **OPTIONS)
    weight, vector = model[0].weight.detach(), onelora.vectors(model)["0"].detach()
    half = weight.half()
    unchanged = ((half.float() + vector[:, None]).half() == half).float().mean().item()
    assert unchanged > 0.5
    assert report.losses["0"].unchanged == pytest.approx(unchanged)
    assert f"at most {unchanged:.1%} of a weight's entries did not move" in str(report)


def test_a_weight_near_the_end_of_float16_is_shown(tmp_path):
    model = linear_model()
    with torch.no_grad():
        model[0].weight[3, 5] = 60000.0
    export_onnx(model.half(), (torch.randn(4, 64).half(),), tmp_path / "m.onnx", verify=False)
    report = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", **OPTIONS)
    assert "float16 range: the largest weight is 6e+04 of 65504" in report.notes
    onelora.adapt(model.float())
    onelora.vectors(model)["0"].data[3] = 6000.0
    onelora.save_adapter(model, tmp_path / "large.safetensors")
    with pytest.raises(onelora.MergeError, match="does not fit"):
        build_engine(tmp_path / "m.onnx", tmp_path / "n.engine", adapter=tmp_path / "large.safetensors", **OPTIONS)
    assert not (tmp_path / "n.engine").exists()


def test_manifest_report_and_reproducible_bytes(tmp_path):
    path, _ = engines.linear(tmp_path)
    report = build_engine(
        path,
        tmp_path / "m.engine",
        flavour="rtx",
        target=["sm_86", "8.9", "120"],
        shapes=[{"input": ((1, 64), (2, 64), (4, 64))}, {"batch": (8, 16, 32)}],
        workspace=1 << 28,
        optimization_level=2,
        timing_cache=tmp_path / "cache",
        progress=False,
    )
    raw = json.loads((tmp_path / "m.engine.json").read_text())
    assert raw["targets"] == ["sm_86", "sm_89", "sm_120"]
    assert raw["profiles"] == [{"input": [[1, 64], [2, 64], [4, 64]]}, {"input": [[8, 64], [16, 64], [32, 64]]}]
    assert raw["flags"] == {"workspace": 1 << 28, "optimization_level": 2}
    assert raw["inputs"] == [{"name": "input", "dtype": "HALF", "shape": [-1, 64]}]
    assert Manifest.read(tmp_path / "m.engine").profiles == report.manifest.profiles
    assert Manifest.read(tmp_path / "m.engine").metadata.to_props() == report.manifest.metadata.to_props()
    assert report.manifest.adapter_sha256 == dict(ir.load(path).metadata_props)["onelora.adapter_sha256"]
    for part in ("sm_120", "float16", "mode 'fold', 1 vectors", "no timing cache", "[8, 64] | [16, 64] | [32, 64]"):
        assert part in str(report), part
    assert not (tmp_path / "cache").exists()
    before = (tmp_path / "m.engine").read_bytes()
    build_engine(path, tmp_path / "n.engine", **OPTIONS, shapes={"batch": (1, 2, 4)})
    build_engine(path, tmp_path / "m.engine", **OPTIONS, shapes={"batch": (1, 2, 4)})
    assert (tmp_path / "m.engine").read_bytes() == (tmp_path / "n.engine").read_bytes() != before


def test_a_report_shows_what_nvidia_warns_of(tmp_path):
    path, _ = engines.linear(tmp_path)
    report = build_engine(path, tmp_path / "m.engine", shapes={"batch": (1, 2, 4)}, **OPTIONS)
    said = dataclasses.replace(report, warnings=["[runtime.cpp::read::1] [/odd] text"], notes=["[x] y"])
    assert "[runtime.cpp::read::1] [/odd] text" in str(said)
    assert "[x] y" in str(said)
