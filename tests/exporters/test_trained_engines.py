"""Heads and norms in engines: the graph that TensorRT gets is the adapter's function, and its own parser takes it."""

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import trained_cases as cases
from engines import OPTIONS
from trained_cases import adapters, expected, exported, inputs

import onelora_compile as onelora
from onelora_compile.exporters import build_engine
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.exporters.tensorrt.feed import adapter_id, vectors_to_feed
from onelora_compile.exporters.tensorrt.manifest import Manifest
from onelora_compile.exporters.tensorrt.refit import vectors_for
from onelora_compile.exporters.tensorrt.vectors import prepared

CELLS = [
    pytest.param(name, variant, marks=() if (name, variant) == ("pooled", "both") else pytest.mark.slow)
    for name in cases.MODELS
    for variant in cases.VARIANTS
]
# Mode of the model and of the engine.
WAYS = [("base", None), ("load", None), ("input", "input"), ("input", "refit")]


@pytest.mark.parametrize(("source", "engine"), WAYS)
@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_the_graph_of_an_engine(name, variant, source, engine, tmp_path):
    x, path, file = inputs(name), exported(name, variant, source), adapters(name, variant) / "b.safetensors"
    if (name, source) == ("images", "base"):
        pytest.skip("its batch norm is merged into the convolution of the base")
    with prepared(path, engine, file, tmp_path) as model:
        ir.save(model.model, tmp_path / "graph.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
        given = {one.name for one in session.get_inputs()} - {"x"}
        assert given == (set(model.vectors) if engine == "input" else set())
        (output,) = session.run(None, {"x": x.numpy()} | (model.vectors if engine == "input" else {}))
        held = onelora.read_adapter(file)
        assert set(model.vectors) <= set(held.tensors)
    assert np.abs(output - expected(name, variant, "b", x)).max() < 1e-5


def build(name, variant, mode, out, **options):
    pytest.importorskip("tensorrt_rtx_bindings")
    path = exported(name, variant, mode)
    common = {**OPTIONS, "shapes": {"batch": (1, 2, 4)}}
    return build_engine(path, out, **common, **options).manifest


def test_an_engine_takes_what_an_adapter_trained(tmp_path):
    files, out = adapters("pooled", "both"), tmp_path / "m.engine"
    manifest = build("pooled", "both", "input", out, adapter=files / "a.safetensors")
    held = onelora.read_adapter(files / "b.safetensors")
    assert set(manifest.trained) == set(held.saved)
    assert {one.name for one in manifest.inputs} == {"x", *held.tensors}
    for adapter in (None, files / "b.safetensors"):
        fed = vectors_to_feed(manifest, out, adapter)
        from_file = onelora.read_adapter(adapter or files / "a.safetensors").tensors
        assert all(np.array_equal(fed[one], from_file[one].numpy()) for one in held.tensors)
    with pytest.raises(onelora.AdapterFileError, match="no trained values for"):
        vectors_to_feed(manifest, out, adapters("pooled", "head") / "a.safetensors")


def test_a_refit_sets_what_an_adapter_trained(tmp_path):
    path, file = exported("pooled", "both", "input"), adapters("pooled", "both") / "b.safetensors"
    held = Metadata.from_props(ir.load(path).metadata_props, str(path))
    known = {field.name for field in dataclasses.fields(Manifest)} & set(vars(held)) - {"mode", "producer"}
    manifest = Manifest(
        flavour="rtx", version="", mode="refit", onnx=path.name, onnx_sha256="", system="",
        **{name: getattr(held, name) for name in known},
    )  # fmt: skip
    _, values = vectors_for(manifest, tmp_path / "m.engine", file)
    assert {name: value.tolist() for name, value in values.items()} == {
        name: tensor.tolist() for name, tensor in onelora.read_adapter(file).tensors.items()
    }


@pytest.mark.parametrize("variant", ["both", pytest.param("vectors", marks=pytest.mark.slow)])
def test_the_adapter_of_a_bank(variant, tmp_path):
    files, out = adapters("pooled", variant), tmp_path / "m.engine"
    manifest = build("pooled", variant, "bank", out)
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes((files / "b.safetensors").read_bytes())
    assert [adapter_id(manifest, out, one) for one in ("a", renamed, files / "a.safetensors", None)] == [0, 1, 0, -1]
    onelora.save_adapter(cases.trained("pooled", variant, 9), tmp_path / "a.safetensors")
    with pytest.raises(onelora.AdapterFileError, match="whatever its name"):
        adapter_id(manifest, out, tmp_path / "a.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name in cases.MODELS for variant in cases.VARIANTS])
def test_the_builder_takes_every_mode(name, variant, mode, tmp_path):
    given = {"adapter": adapters(name, variant) / "b.safetensors"} if mode in ("base", "load", "input") else {}
    if (name, mode) == ("images", "base"):
        given = {}
    manifest = build(name, variant, mode, tmp_path / "m.engine", **given)
    assert manifest.mode == {"base": "fold" if given else "base", "load": "fold"}.get(mode, mode)
