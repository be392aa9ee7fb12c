"""bundle(): what is in the folder."""

import ast
import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import bundles
import numpy as np
import onnx
import pytest
import torch
import zoo
from bundles import base_model, exported
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import onelora_compile as onelora
from onelora_compile.cli import app
from onelora_compile.exporters import bundle
from onelora_compile.exporters.jetson import device
from onelora_compile.exporters.jetson.releases import JETPACKS
from onelora_compile.testing import assert_parity, fill_vectors
from onelora_compile.weights.adapter_file import read_adapter

DEVICE = Path(device.__path__[0])


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("mode", bundles.MODES)
def test_the_folder_holds_what_the_manifest_says(mode, tmp_path):
    folder = bundles.fresh(mode, tmp_path)
    manifest = manifest_of(folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(manifest["files"]) | {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert manifest["model"]["mode"] == mode
    assert len((folder / "README.md").read_text().splitlines()) < 50
    assert os.access(folder / "build_and_run.py", os.X_OK)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)


def test_an_input_model_has_no_defaults_and_their_values_are_an_adapter(tmp_path):
    folder = bundles.fresh("input", tmp_path)
    model = onnx.load(folder / "model.onnx")
    original = onnx.load(bundles.sources() / "input.onnx")
    names = set(manifest_of(folder)["vectors"])
    assert names <= {tensor.name for tensor in original.graph.initializer}
    assert not names & {tensor.name for tensor in model.graph.initializer}
    assert names <= {value.name for value in model.graph.input}
    default = read_adapter(folder / "adapters" / "default.safetensors")  # is an adapter of this package too
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in original.graph.initializer}
    assert all(np.array_equal(default.vectors[name].numpy(), values[name]) for name in names)
    model = onelora.load_adapter(base_model(), folder / "adapters" / "default.safetensors")
    assert set(onelora.vectors(model)) == names


def test_a_refit_model_is_built_with_distinct_values_that_are_no_adapter(tmp_path):
    folder = bundles.fresh("refit", tmp_path)
    model = onnx.load(folder / "model.onnx")
    names = list(manifest_of(folder)["vectors"])
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert not set(names) & {value.name for value in model.graph.input}
    built = [values[name] for name in names]
    assert all(np.abs(value).max() > 0 for value in built)
    assert len({value.tobytes() for value in built}) == len(built)


@pytest.mark.parametrize(("jetpack", "opset"), [("5.1", 17), ("6.0", 17), ("6.2", 20), ("7.2", 20), ("6.2.1", 20)])
def test_opset_and_operators_fit_the_release(jetpack, opset, tmp_path):
    bundle(bundles.sources() / "fold.onnx", tmp_path / "b", jetpack=jetpack, shapes=bundles.SHAPES)
    model = onnx.load(tmp_path / "b" / "model.onnx")
    operators = {node.op_type for node in model.graph.node}
    assert model.opset_import[0].version == opset
    assert ("LayerNormalization" in operators) == (jetpack != "5.1")
    assert ("Gelu" in operators) == (opset == 20)
    assert not any(node.metadata_props for node in model.graph.node)  # paths of the exporting machine


@pytest.mark.parametrize(
    ("jetpack", "has", "hasnot"),
    [
        ("5.1", ["--memPoolSize=workspace:512", "--minShapes=x:1x16x12"], ["--builderOptimizationLevel", "strongly"]),
        ("6.0", ["--builderOptimizationLevel=3"], ["--stronglyTyped", "--fp16"]),
        ("6.2", ["--builderOptimizationLevel=3", "--stronglyTyped", "--maxShapes=x:4x16x12"], ["--fp16"]),
    ],
)
def test_trtexec_has_the_flags_of_the_release(jetpack, has, hasnot, tmp_path):
    bundle(bundles.sources() / "fold.onnx", tmp_path / "b", jetpack=jetpack, shapes=bundles.SHAPES)
    script = (tmp_path / "b" / "trtexec.sh").read_text()
    assert all(part in script for part in has)
    assert not any(part in script for part in hasnot)
    # A shell runs it: with a command that prints its arguments in the place of trtexec.
    done = subprocess.run(
        ["sh", tmp_path / "b" / "trtexec.sh", "--verbose"],
        env={**os.environ, "TRTEXEC": "echo"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("--onnx=model.onnx --saveEngine=")
    assert done.stdout.strip().endswith("--verbose")


@pytest.mark.parametrize("jetpack", ["5.1", "6.2"])
def test_half_precision(jetpack, tmp_path):
    model = fill_vectors(onelora.adapt(zoo.TinyViT()), 0.1)
    x = torch.randn(2, 16, 12)
    path = exported(model, (x,), tmp_path / "m.onnx", adapters="input", dtype=torch.float16)
    report = bundle(path, tmp_path / "b", jetpack=jetpack)
    manifest = manifest_of(tmp_path / "b")
    assert manifest["model"]["dtypes"][0] == "float16"
    assert set(manifest["tolerance"].values()) == {2e-2}
    assert ("--fp16" in (tmp_path / "b" / "trtexec.sh").read_text()) == (jetpack == "5.1")
    assert ("may take float32" in report.types) == (jetpack == "5.1")
    assert all(check.passed for check in report.checks)


def test_weak_typing_is_said(tmp_path):
    report = bundle(bundles.sources() / "fold.onnx", tmp_path / "b", shapes=bundles.SHAPES, weak_fp16=True)
    assert "TensorRT chooses" in str(report)
    script = (tmp_path / "b" / "trtexec.sh").read_text()
    assert "--fp16" in script
    assert "--stronglyTyped" not in script
    plain = bundle(bundles.sources() / "fold.onnx", tmp_path / "c", shapes=bundles.SHAPES)
    assert "float32, as the model has it: for float16 export with dtype=torch.float16" in plain.types


def test_ranges_of_other_inputs_follow_from_names(tmp_path):
    folder = bundles.fresh("bank", tmp_path)
    profiles = manifest_of(folder)["build"]["profiles"]
    assert profiles["adapter_ids"] == [[1], [2], [4]]


def test_given_inputs_are_the_reference(tmp_path):
    x = np.full((3, 16, 12), 0.5, np.float32)
    bundle(bundles.sources() / "fold.onnx", tmp_path / "b", shapes=bundles.SHAPES, inputs={"x": x})
    stored = load_file(tmp_path / "b" / "reference" / "given.safetensors")
    assert np.array_equal(stored["inputs/x"].numpy(), x)
    with pytest.raises(onelora.ConfigError, match=r"inputs: 'x' is \[9, 16, 12\], outside of \[1, 16, 12\]"):
        bundle(
            bundles.sources() / "fold.onnx",
            tmp_path / "c",
            shapes=bundles.SHAPES,
            inputs={"x": np.zeros((9, 16, 12), np.float32)},
        )


class Scaled(torch.nn.Module):
    """A model with an input of no dimensions, as a sample rate is."""

    def __init__(self):
        super().__init__()
        self.inner = zoo.MLP()

    def forward(self, x, rate):
        return self.inner(x) * rate


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_an_input_without_dimensions_is_given_as_a_number_or_as_one_of_one_entry(shape, tmp_path):
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(4, 8)
    source = exported(model, (x, torch.tensor(3)), tmp_path / "m.onnx", input_names=["x", "rate"])
    bundle(source, tmp_path / "b", inputs={"x": x.numpy(), "rate": np.full(shape, 5)})
    stored = load_file(tmp_path / "b" / "reference" / "given.safetensors")
    assert stored["inputs/rate"].shape == ()
    (found,) = (value for name, value in stored.items() if name.startswith("outputs/"))
    plain, exact = 5 * model.inner(x), 5 * copy.deepcopy(model.inner).double()(x.double())
    assert_parity(found, exact, plain)
    assert bundles.call(tmp_path / "b", "selftest") == 0


def test_an_input_of_one_shape_is_not_said_to_take_a_range(tmp_path):
    x = torch.randn(4, 8)
    source = exported(Scaled(), (x, torch.tensor(3)), tmp_path / "m.onnx", input_names=["x", "rate"])
    for inputs, message in (
        ({"x": x, "rate": np.ones(2, int)}, r"inputs: 'rate' is \[2\], and the model takes \[\]"),
        ({"x": x[:3], "rate": 1}, r"inputs: 'x' is \[3, 8\], and the model takes \[4, 8\]"),
    ):
        with pytest.raises(onelora.ConfigError, match=message):
            bundle(source, tmp_path / "b", inputs=inputs)


def test_weights_of_another_file_are_in_the_model_of_the_bundle(tmp_path):
    source = tmp_path / "m.onnx"
    model = onnx.load(bundles.sources() / "fold.onnx")
    onnx.save(model, source, save_as_external_data=True, location="m.onnx.data", size_threshold=256)
    report = bundle(source, tmp_path / "b", jetpack="7.2", shapes=bundles.SHAPES)  # no graph of it is rewritten there
    assert not any(name.endswith(".data") for name in manifest_of(report.folder)["files"])
    found = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    for tensor in onnx.load(source).graph.initializer:
        np.testing.assert_array_equal(values[tensor.name], onnx.numpy_helper.to_array(tensor))


def test_external_data(tmp_path, monkeypatch):
    source = bundles.sources() / "load.onnx"  # made once in a process, so not with what is set here
    monkeypatch.setattr("onelora_compile.exporters.onnx_file.save.EXTERNAL_FROM", 1000)
    report = bundle(source, tmp_path / "b", shapes=bundles.SHAPES)
    manifest = manifest_of(tmp_path / "b")
    assert manifest["model"]["files"] == ["model.onnx", "model.onnx.data", "model.onnx.vectors"]
    assert (tmp_path / "b" / "model.onnx").stat().st_size < (tmp_path / "b" / "model.onnx.data").stat().st_size
    assert all(check.passed for check in report.checks)


def test_command_line(tmp_path):
    folder = bundles.sources()
    arguments = ["bundle", folder / "input.onnx", "-o", tmp_path / "b", "--jetpack", "7.2", "--adapter"]
    arguments += [folder / "a.safetensors", "--size", "batch=1,2,4", "--swap", "refit"]
    done = CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "JetPack 7.2, TensorRT 10.16.2" in done.output
    assert manifest_of(tmp_path / "b")["model"]["mode"] == "refit"
    bad = CliRunner().invoke(app, ["bundle", "m.onnx", "-o", "b", "--size", "x=axb"])
    assert isinstance(bad.exception, onelora.ConfigError)
    assert "is not of the form batch=8, batch=1,8,32" in str(bad.exception)


def test_every_jetpack_makes_a_bundle(tmp_path):
    source = exported(zoo.MLP(), (torch.randn(4, 8),), tmp_path / "m.onnx")
    for version, jetpack in JETPACKS.items():
        report = bundle(source, tmp_path / "b", jetpack=version)
        assert report.tensorrt == jetpack.tensorrt


def test_the_devices_program_is_python_3_8(tmp_path):
    files = sorted(DEVICE.rglob("*.py"))
    assert len(files) > 8
    for file in files:
        ast.parse(file.read_text(), feature_version=(3, 8))
    for python in sorted(Path.home().glob(".pyenv/versions/3.8.*/bin/python")):
        folder = bundles.fresh("load", tmp_path)
        done = subprocess.run([python, "-W", "error", folder / "build_and_run.py", "status"], capture_output=True)
        assert done.returncode == 0, done.stderr
        names = [file.relative_to(DEVICE).with_suffix("").as_posix().replace("/", ".") for file in files]
        names = [f"onelora_device.{name}" for name in names if name not in ("build_and_run", "polygraphy_data")]
        done = subprocess.run(
            [python, "-W", "error", "-c", "import " + ", ".join(names)], cwd=folder, capture_output=True
        )
        assert done.returncode == 0, done.stderr


def test_the_devices_program_imports_nothing_but_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {"onnxruntime", "numpy"}  # those two inside of functions
    for file in DEVICE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.split(".")[0] for name in names} <= allowed
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert not top & {"numpy", "onnxruntime", "tensorrt"}


def test_adapter_files_of_the_package_and_of_the_bundle_are_one_format(tmp_path):
    folder = bundles.fresh("input", tmp_path)
    tensors = bundles.device(folder, "tensors")
    read, metadata = tensors.read_safetensors(str(folder / "adapters" / "a.safetensors"))
    expected = load_file(folder / "adapters" / "a.safetensors")
    assert set(read) == set(expected)
    assert all(np.array_equal(read[name].numpy(), expected[name].numpy()) for name in expected)
    assert metadata["format"] == "onelora"
    values = {"f16": torch.randn(3, 2).half(), "bf16": torch.randn(4).bfloat16(), "flag": torch.tensor([True, False])}
    values |= {"i64": torch.tensor([[-5, 2**40]]), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(values, tmp_path / "mixed.safetensors")
    mixed, _ = tensors.read_safetensors(str(tmp_path / "mixed.safetensors"))
    for name, value in values.items():
        assert mixed[name].values() == value.flatten().tolist()
        assert mixed[name].shape == tuple(value.shape)
    (tmp_path / "again.safetensors").write_bytes(tensors.safetensors_bytes(mixed, {"k": "v"}))
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], value) for name, value in values.items())
