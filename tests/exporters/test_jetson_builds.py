"""Bundles and NVIDIA's real parser and builder: TensorRT-RTX builds for a GPU that is not here."""

import hashlib
import json

import bundles
import numpy as np
import onnx
import pytest
import torch
import zoo
from bundles import plans, run

import onelora_compile as onelora
from onelora_compile.exporters import bundle, export_onnx
from onelora_compile.exporters.jetson.device.core.logger import logger
from onelora_compile.testing import fill_vectors
from onelora_compile.weights.adapter_file import read_adapter

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")


def build(folder, *args):
    return run(folder, "--runtime", "tensorrt_rtx", "build", "--sm", "86", *args)


@pytest.mark.parametrize("jetpack", ["5.1", "6.2"])
@pytest.mark.parametrize("mode", ["fold", "load", "input", "bank"])
def test_nvidias_builder_takes_every_mode(mode, jetpack, tmp_path, capsys):
    folder = bundles.fresh(mode, tmp_path, jetpack)
    assert build(folder) == 0, capsys.readouterr().err
    (plan,) = plans(folder)
    record = json.loads(plan.with_suffix(".json").read_text())
    assert record["identity"]["sm"] == "8.6"
    before = plan.stat().st_mtime_ns
    assert build(folder) == 0
    assert plan.stat().st_mtime_ns == before  # it is there already
    assert build(folder, "--force") == 0
    assert plans(folder)[0].stat().st_mtime_ns != before


def test_load_builds_an_engine_for_each_adapter_with_its_weights(tmp_path):
    folder = bundles.fresh("load", tmp_path)
    model = onnx.load(folder / "model.onnx")
    assert build(folder) == 0
    assert run(folder, "--runtime", "tensorrt_rtx", "use", "b", "--sm", "86") == 0
    assert len(plans(folder)) == 2
    added = next(node for node in model.graph.node if node.op_type == "Add" and _vector_of(model, node))
    name, axis, weight = _vector_of(model, added)
    records = [json.loads(plan.with_suffix(".json").read_text())["identity"]["adapter"] for plan in plans(folder)]
    held = {entry["sha256"]: entry for entry in json.loads((folder / "manifest.json").read_text())["adapters"]}
    for plan, digest in zip(plans(folder), records, strict=True):
        vector = read_adapter(folder / held[digest]["file"]).vectors[name].numpy()
        folded = weight + np.expand_dims(vector, axis)
        other = next(entry for key, entry in held.items() if key not in (digest, ""))
        wrong = read_adapter(folder / other["file"]).vectors[name].numpy()
        content = plan.read_bytes()
        rows = [*folded, *folded.T]  # the builder may have transposed it
        assert any(np.ascontiguousarray(row).tobytes() in content for row in rows)
        rows = [*(weight + np.expand_dims(wrong, axis)), *(weight + np.expand_dims(wrong, axis)).T]
        assert not any(np.ascontiguousarray(row).tobytes() in content for row in rows)


def test_load_in_half_precision_leaves_neither_the_weight_nor_the_vector(tmp_path):
    model = fill_vectors(onelora.adapt(zoo.TinyViT()), 0.3)
    export_onnx(model, (torch.randn(2, 16, 12),), tmp_path / "m.onnx", adapters="load", dtype=torch.float16)
    bundle(tmp_path / "m.onnx", tmp_path / "b")
    assert build(tmp_path / "b") == 0
    content = plans(tmp_path / "b")[0].read_bytes()
    # Not qkv: the builder puts the scale of the attention, which is on q alone, into these weights.
    weight = model.get_parameter("blocks.0.fc1.weight").detach().half()
    vector = onelora.vectors(model)["blocks.0.fc1"].detach()

    def held(matrix):
        return any(np.ascontiguousarray(row).tobytes() in content for row in [*matrix.numpy(), *matrix.numpy().T])

    assert held((weight.float() + vector[:, None]).half())
    assert not held(weight)
    assert vector.numpy().tobytes() not in content


def test_load_keeps_the_engines_in_use_and_before(tmp_path):
    folder = bundles.fresh("load", tmp_path)
    assert build(folder) == 0
    for name, count in (("a", 2), ("b", 2), ("a", 2), ("base", 2)):
        assert run(folder, "--runtime", "tensorrt_rtx", "use", name, "--sm", "86") == 0
        assert len(plans(folder)) == count
    times = {plan.name: plan.stat().st_mtime_ns for plan in plans(folder)}
    assert run(folder, "--runtime", "tensorrt_rtx", "rollback", "--sm", "86") == 0
    assert {plan.name: plan.stat().st_mtime_ns for plan in plans(folder)} == times  # nothing was built


def _vector_of(model, node):
    """(name of the vector, axis, weight) of an Add that folds one in, None of any other."""
    produced = {one.output[0]: one for one in model.graph.node}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for wide, narrow in ((0, 1), (1, 0)):
        unsqueeze = produced.get(node.input[narrow])
        if unsqueeze is not None and unsqueeze.op_type == "Unsqueeze" and node.input[wide] in tensors:
            axis = int(onnx.numpy_helper.to_array(tensors[unsqueeze.input[1]])[0])
            return unsqueeze.input[0], axis, onnx.numpy_helper.to_array(tensors[node.input[wide]])
    return None


def test_refit_marks_every_vector_and_needs_a_gpu_to_build(tmp_path, capsys):
    # TensorRT-RTX compiles engines with refittable weights on a GPU only; that it got there means that it took the
    # names of the vectors, which is what can be known here.
    folder = bundles.fresh("refit", tmp_path)
    assert build(folder) == 1
    text = capsys.readouterr().err
    assert "CUDA_SUCCESS" in text
    assert "finds no weights" not in text
    network, _parser = _parsed(folder / "model.onnx")
    names = json.loads((folder / "manifest.json").read_text())["vectors"]
    assert all(network.mark_weights_refittable(name) for name in names)
    assert not network.mark_weights_refittable("no such name")


def _parsed(path):
    log = logger(rtx)
    network = rtx.Builder(log).create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, log)
    assert parser.parse_from_file(str(path))
    return network, parser  # whose memory the network's weights are


def test_an_input_model_keeps_its_vectors_as_inputs_of_the_network(tmp_path):
    # A default value would make each a constant, and every adapter would do nothing.
    folder = bundles.fresh("input", tmp_path)
    names = set(json.loads((folder / "manifest.json").read_text())["vectors"])
    network, _parser = _parsed(folder / "model.onnx")
    found = {network.get_input(index).name for index in range(network.num_inputs)}
    assert found == names | {"x"}
    original, _parser = _parsed(bundles.sources() / "input.onnx")
    assert original.num_inputs == 1  # the trap


def test_what_nvidia_refuses_is_explained(tmp_path, capsys):
    model = onelora.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    export_onnx(model, (torch.randn(2, 8),), tmp_path / "m.onnx", opset_version=18)
    bundle(tmp_path / "m.onnx", tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())

    broken = onnx.load(tmp_path / "b" / "model.onnx")
    broken.graph.node[0].op_type = "Nonsense"
    onnx.save(broken, tmp_path / "b" / "model.onnx")
    assert build(tmp_path / "b") == 1
    assert "the bundle is damaged, copy it again" in capsys.readouterr().err
    content = (tmp_path / "b" / "model.onnx").read_bytes()
    manifest["files"]["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    assert build(tmp_path / "b") == 1
    text = capsys.readouterr().err
    assert "TensorRT can't read the model" in text
    assert "-> this TensorRT has no such operator" in text
    assert not plans(tmp_path / "b")


def test_missing_profile_is_explained(tmp_path, capsys):
    folder = bundles.fresh("fold", tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["build"]["profiles"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert build(folder) == 1
    assert "make the bundle again with shapes" in capsys.readouterr().err


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return zoo.logits(self.model(**inputs))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_nvidias_builder_takes_real_architectures(name, dtype, tmp_path):
    model, inputs = zoo.MODELS[name]()
    fill_vectors(onelora.adapt(model), 0.05)
    for mode in ("fold", "load", "input"):
        export_onnx(Logits(model), (), tmp_path / "m.onnx", kwargs=inputs, adapters=mode, dtype=dtype)
        for jetpack in ("5.1", "6.2"):
            report = bundle(tmp_path / "m.onnx", tmp_path / f"{mode}-{jetpack}", jetpack=jetpack)
            assert all(check.passed for check in report.checks)
            assert build(tmp_path / f"{mode}-{jetpack}") == 0
