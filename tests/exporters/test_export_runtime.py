"""The files of runtimes that read programs of torch.export: each is run, with other vectors too, and none is lost.

What needs a package that the default environment lacks is marked `runtimes`: make test-runtimes.
"""

import dataclasses
import importlib
import json

import paths
import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.cli import main
from onelora_compile.exporters import export_program, export_runtime
from onelora_compile.exporters.calls.signature import identifiers
from onelora_compile.exporters.to_program import export_runtime as steps
from onelora_compile.exporters.to_program.runtimes import RUNTIMES
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

NEEDS = {"executorch": "executorch", "openvino": "openvino"}
RUNTIME = [pytest.param(name, marks=pytest.mark.runtimes if name in NEEDS else ()) for name in RUNTIMES]
MODES = ("fold", "input")


def small(seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    return fill_vectors(onelora.adapt(model), 0.1, seed), torch.randn(4, 6)


def as_inputs(values):
    return dict(zip(identifiers(values), values.values(), strict=True))


def name_of(runtime):
    return f"model{RUNTIMES[runtime].endings[0]}"


@pytest.mark.filterwarnings("ignore")  # of converters
@pytest.mark.parametrize("runtime", RUNTIME)
def test_a_file_takes_another_adapter_without_being_built_again(runtime, tmp_path):
    pytest.importorskip(NEEDS.get(runtime, "torch"))
    (model, x), (other, _) = small(), small(seed=1)
    path = tmp_path / name_of(runtime)
    shapes = ({0: torch.export.Dim("batch", max=16) if RUNTIMES[runtime].bounded else "batch"},)
    report = export_runtime(model, (x,), path, runtime=runtime, adapters="input", dynamic_shapes=shapes)
    assert report.parity is not None
    assert report.parity.passed
    assert report.files == [path.with_suffix(ending) for ending in RUNTIMES[runtime].endings]
    feed, rows = RUNTIMES[runtime].run(path), torch.randn(7, 6)
    for one in (model, other):
        (found,) = feed((rows,), {key: value.detach() for key, value in as_inputs(onelora.vectors(one)).items()})
        assert_parity(found.detach(), merged_copy(one, torch.float64)(rows.double()), merged_copy(one)(rows), floor=8)
    assert [file.name for file in tmp_path.iterdir() if file not in report.files] == []


CELLS = [
    pytest.param(name, runtime, mode, dtype, marks=[pytest.mark.runtimes] if runtime in NEEDS else [pytest.mark.slow])
    for name in ("bert", "vit", "llama", "encoder_post_norm")
    for runtime in RUNTIMES
    for mode in MODES
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "runtime", "mode", "dtype"), CELLS)
def test_architectures(name, runtime, mode, dtype, tmp_path):
    pytest.importorskip(NEEDS.get(runtime, "torch"))
    model, inputs = paths.build(name)
    model, inputs = model.to(getattr(torch, dtype)), converted(inputs, getattr(torch, dtype))
    inputs |= {"use_cache": False} if name == "llama" else {}
    fill_vectors(onelora.adapt(model), 0.02)
    oracle = paths.Oracle(model, inputs, grad=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = export_runtime(model, (), tmp_path / name_of(runtime), inputs, runtime=runtime, adapters=mode)
    given = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    given |= (
        {key: value.detach() for key, value in as_inputs(onelora.vectors(model)).items()} if mode == "input" else {}
    )
    found = RUNTIMES[runtime].run(report.files[0])((), given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    oracle.check(found[0], f"{runtime} {mode}")


def converted(inputs, dtype):
    floats = {
        key: value for key, value in inputs.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return inputs | {key: value.to(dtype) for key, value in floats.items()}


def test_a_file_that_is_not_the_model_is_not_left(tmp_path, monkeypatch):
    model, x = small()
    path = tmp_path / "model.pt2"
    export_runtime(model, (x,), path)
    before = path.read_bytes()
    broken = dataclasses.replace(RUNTIMES["pt2"], run=shifted(RUNTIMES["pt2"].run))
    monkeypatch.setattr(steps, "RUNTIMES", RUNTIMES | {"pt2": broken})
    with pytest.raises(onelora.ExportError, match=r"file for torch\.export differs from Sequential with its vectors"):
        export_runtime(model, (x,), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def shifted(run):
    return lambda path: lambda args, kwargs: [one + 0.01 for one in run(path)(args, kwargs)]


def test_names_of_files(tmp_path):
    model, x = small()
    for name, runtime, said in (
        ("model.onnx", "pt2", r"a file for torch\.export ends in \.pt2"),
        ("model", "aoti", r"a file for AOTInductor ends in \.pt2"),
        ("model.pt2", "executorch", r"a file for ExecuTorch ends in \.pte"),
        ("", "pt2", "is no name of a file"),
    ):
        with pytest.raises(onelora.ConfigError, match=said):
            export_runtime(model, (x,), tmp_path / name if name else name, runtime=runtime)
    with pytest.raises(onelora.ConfigError, match="is a program of PyTorch"):
        onelora.save_adapter(model, tmp_path / "a.pt2")
    (tmp_path / "settings.xml").write_text("<settings><colour>red</colour></settings>")
    (tmp_path / "weights.bin").write_bytes(b"1")
    with pytest.raises(onelora.ConfigError, match="is there and is not an OpenVINO model"):
        export_runtime(model, (x,), tmp_path / "settings.xml", runtime="openvino")
    with pytest.raises(onelora.ConfigError, match=r"weights\.bin is there without"):
        export_runtime(model, (x,), tmp_path / "weights.xml", runtime="openvino")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export_runtime(model, (x,), tmp_path / "gone" / "model.pt2")


@pytest.mark.parametrize("name", list(NEEDS))
def test_a_runtime_that_is_missing_is_named(name, tmp_path, monkeypatch):
    def missing(module, *more):
        raise ImportError(name=module)

    monkeypatch.setattr(importlib, "import_module", missing)
    model, x = small()
    with pytest.raises(onelora.MissingExtraError, match=f"pip install {name}$"):
        export_runtime(model, (x,), tmp_path / name_of(name), runtime=name)


USER = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), (torch.randn(2, 5, 4),)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "programmodels.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(words, capfd, code=0):
    with pytest.raises(SystemExit) as left:
        main(words)
    said = capfd.readouterr()
    assert (left.value.code or 0) == code, said.err
    return said


def test_the_command(project, capfd):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(9, 5, 4)
    onelora.save_adapter(fill_vectors(onelora.adapt(model), 0.1), "a.safetensors")
    words = ["export", "programmodels:make", "-o", "m.pt2", "--to", "pt2", "--adapter", "a.safetensors"]
    report = json.loads(run([*words, "--json"], capfd).out)
    assert report["runtime"] == "torch.export"
    assert report["opset_version"] is None
    assert report["parity"]["passed"]
    torch.testing.assert_close(torch.export.load("m.pt2").module()(x), model(x))
    assert "torch.export against eager" in run([*words, "--adapters", "input"], capfd).out
    given = {f"_{name}": vector for name, vector in onelora.vectors(model).items()}
    torch.testing.assert_close(torch.export.load("m.pt2").module()(x, **given), model(x))


def test_wrong_words(project, capfd):
    words = ["export", "programmodels:make", "-o", "m.pt2", "--to", "pt2"]
    assert "--opset is for --to onnx, not for pt2" in run([*words, "--opset", "18"], capfd, 1).err
    assert "--half is for --to onnx" in run([*words, "--half"], capfd, 1).err
    assert "adapters='bank' is not one of 'fold', 'input'" in run([*words, "--adapters", "bank"], capfd, 1).err
    assert "largest size" in run([*words[:-1], "executorch", "--dynamic", "1=tokens"], capfd, 1).err
    assert "ends in .pte" in run([*words[:-1], "executorch"], capfd, 1).err
    assert "--to" in run([*words[:-1], "tflite"], capfd, 2).err
    assert not (project / "m.pt2").exists()


@pytest.mark.runtimes
def test_executorch_needs_a_largest_size(tmp_path):
    pytest.importorskip("executorch")
    model, x = small()
    with pytest.raises(onelora.ExportError, match="plans memory for the largest sizes"):
        export_runtime(model, (x,), tmp_path / "m.pte", runtime="executorch", dynamic_shapes=({0: "batch"},))
    assert not list(tmp_path.iterdir())


def test_a_program_that_a_runtime_refuses(tmp_path, monkeypatch):
    model, x = small()

    def refuse(program, path):
        raise RuntimeError("no such operator")

    refusing = dataclasses.replace(RUNTIMES["pt2"], write=refuse)
    monkeypatch.setattr(steps, "RUNTIMES", RUNTIMES | {"pt2": refusing})
    with pytest.raises(onelora.ExportError, match="can't take the exported program of Sequential: no such operator"):
        export_runtime(model, (x,), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_the_program_and_the_file_are_one(tmp_path):
    model, x = small()
    export_runtime(model, (x,), tmp_path / "m.pt2", adapters="input")
    one, other = export_program(model, (x,), adapters="input"), torch.export.load(tmp_path / "m.pt2")
    assert [str(node) for node in one.graph.nodes] == [str(node) for node in other.graph.nodes]
    assert one.state_dict.keys() == other.state_dict.keys()
