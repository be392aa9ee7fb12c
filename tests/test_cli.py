"""The command line, as a user types it."""

import json
import shutil
import subprocess
import sys
import warnings

import peft_folders
import pytest
import torch
import zoo
from command_line import run, run_in
from safetensors.torch import load_file

import onelora_compile as onelora
from onelora_compile.cli import main
from onelora_compile.testing import fill_vectors
from onelora_compile.weights.adapter_file import read_adapter


def onelora_command(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "onelora_compile", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def project(tmp_path):
    """A module with a model, an adapter of it."""
    (tmp_path / "mymodels.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), (torch.randn(2, 4),)\n"
        "def wrong():\n"
        "    return 3\n"
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    onelora.save_adapter(fill_vectors(onelora.adapt(model)), tmp_path / "a.safetensors")
    return tmp_path


def test_help_names_every_command():
    text = run("--help").output
    for command in ("demo", "inspect", "export", "fold", "convert", "combine", "verify", "engine", "refit", "doctor"):
        assert command in text
    assert run().exit_code in (0, 2)
    assert run("--version").output.strip() == onelora.__version__


def test_doctor():
    result = run("doctor")
    assert result.exit_code == 0
    for part in ("torch", torch.__version__, "registered", "onnxruntime", "C++ compiler", "TensorRT-RTX"):
        assert part in result.output


def test_inspect_an_adapter(project):
    result = run("inspect", project / "a.safetensors")
    assert result.exit_code == 0
    for part in ("1LoRA adapter", "[3, 4]", "float32", "2 vectors, 5 numbers", "all-linear"):
        assert part in result.output


def test_export_and_inspect_the_model(project):
    done = onelora_command("export", "mymodels:make", "-o", "m.onnx", "--adapter", "a.safetensors", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    result = run("inspect", project / "m.onnx")
    parts = (
        "ONNX model",
        "mode 'fold', 2 vectors",
        "opset",
        "input: FLOAT [batch,4]",
        "base weights",
        "[3, 4]",
        "float32",
    )
    for part in parts:
        assert part in result.output


def test_fold_a_base_and_verify_it_against_eager_and_another_file(project):
    assert run_in(project, "export", "mymodels:make", "-o", "base.onnx").exit_code == 0
    done = run_in(project, "fold", "base.onnx", "a.safetensors", "-o", "folded.onnx")
    assert done.exit_code == 0, done.output
    assert "folded 2 vectors into folded.onnx" in done.output
    result = run_in(project, "inspect", "folded.onnx")
    for part in ("mode 'fold', 2 vectors", "a", "from base.onnx by pytorch"):
        assert part in result.output
    assert run_in(project, "verify", "folded.onnx", "mymodels:make", "--adapter", "a.safetensors").exit_code == 0
    failed = run_in(project, "verify", "folded.onnx", "base.onnx")
    assert failed.exit_code == 1
    assert "FAILED" in failed.output
    assert run_in(project, "fold", "base.onnx", "a.safetensors", "-o", "base.onnx").exit_code == 0  # in place
    assert run_in(project, "verify", "folded.onnx", "base.onnx").exit_code == 0


def test_a_vector_without_a_place_is_left_out_when_asked(project):
    with open(project / "mymodels.py", "a") as file:
        file.write("def part():\n    model, args = make()\n    return model[:1], args\n")
    words = ("fold", "part.onnx", "a.safetensors", "-o", "folded.onnx")
    assert run_in(project, "export", "mymodels:part", "-o", "part.onnx").exit_code == 0
    assert run_in(project, *words).exit_code == 1
    done = run_in(project, *words, "--skip-unmatched")
    assert done.exit_code == 0, done.output
    assert "folded 1 vector" in done.output


@pytest.mark.parametrize("mode", ["load", "input", "bank"])
def test_export_in_each_mode_convert_and_verify(project, mode):
    chosen = ("--bank", "a.safetensors") if mode == "bank" else ("--adapter", "a.safetensors")
    done = run_in(project, "export", "mymodels:make", "-o", "m.onnx", "--adapters", mode, *chosen)
    assert done.exit_code == 0, done.output
    shown = run_in(project, "inspect", "m.onnx").output
    for part in (f"mode '{mode}', 2 vectors", "[3, 4]", *(["0 a"] if mode == "bank" else [])):
        assert part in shown
    assert "FLOAT [3]" not in shown  # inputs are those that a call must give
    assert run_in(project, "verify", "m.onnx", "mymodels:make", "--adapter", "a.safetensors").exit_code == 0
    if mode == "bank":
        return
    for name in ("b.onnx_adapter", "b.vectors"):
        done = run_in(project, "convert", "a.safetensors", "-o", name, "--like", "m.onnx")
        assert done.exit_code == 0, done.output
        assert run_in(project, "convert", name, "-o", "back.safetensors", "--like", "m.onnx").exit_code == 0
        old, new = (read_adapter(project / one).vectors for one in ("a.safetensors", "back.safetensors"))
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.slow
def test_bench(project):
    done = run_in(project, "bench", "mymodels:make", "--rounds", "3", "--no-compiled")
    assert done.exit_code == 0, done.output
    for part in ("training step of Sequential, 2 vectors", "frozen base", "1LoRA", "kept for backward", "eager"):
        assert part in done.output
    assert "compiled" not in done.output
    assert run_in(project, "bench", "--rounds", "2", "--no-compiled").exit_code == 0  # its own model


def test_half_precision_export(project):
    assert (
        run_in(project, "export", "mymodels:make", "-o", "h.onnx", "--adapter", "a.safetensors", "--half").exit_code
        == 0
    )
    assert "FLOAT16" in run_in(project, "inspect", "h.onnx").output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "nothing.safetensors"), "there is no file nothing.safetensors"),
        (("inspect", "mymodels.py"), "not a safetensors file"),
        (("export", "mymodels", "-o", "m.onnx"), "not of the form module:function"),
        (("export", "nomodule:make", "-o", "m.onnx"), "No module named 'nomodule'"),
        (("export", "mymodels:made", "-o", "m.onnx"), "has no 'made'"),
        (("export", "mymodels:wrong", "-o", "m.onnx"), "must return (model, args)"),
        (("export", "mymodels:make", "-o", "no/m.onnx"), "does not exist"),
        (("export", "mymodels:make", "-o", "m.onnx", "--adapter", "b"), "there is no adapter file b"),
        (("export", "mymodels:make", "-o", "m.onnx", "--adapters", "bank"), "adapters='bank' needs bank=[files]"),
        (("export", "mymodels:make", "-o", "m.onnx", "--adapters", "load"), "needs an adapted model"),
        (("fold", "a.safetensors", "a.safetensors", "-o", "m.onnx"), "not an ONNX model"),
        (("fold", "no.onnx", "a.safetensors", "-o", "m.onnx"), "there is no file no.onnx"),
        (("convert", "a.safetensors", "-o", "m.onnx"), "the ending names the format"),
        (("convert", "a.safetensors", "-o", "a.vectors"), "give the ONNX model"),
        (("verify", "m.onnx", "mymodels:make"), "m.onnx"),
        (("bench", "mymodels:make", "--rounds", "1"), "at least 2 are needed"),
        (("verify", "a.onnx", "b.onnx", "--size", "batch"), "is not of the form batch=8"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_one(project, args, message, monkeypatch, capfd):
    monkeypatch.chdir(project)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    with pytest.raises(SystemExit, match=r"^1$"):
        main(args)
    sys.modules.pop("mymodels", None)
    said = capfd.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (project / "m.onnx").exists()


def test_damaged_onnx(project):
    (project / "bad.onnx").write_bytes(b"\x08\x07nonsense")
    done = onelora_command("inspect", "bad.onnx", cwd=project)
    assert done.returncode == 1
    assert "not an ONNX model" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_usage_is_exit_code_two():
    assert onelora_command("frobnicate").returncode == 2
    assert onelora_command("export").returncode == 2


def test_a_loaded_model_of_another_base_is_refused(project):
    torch.manual_seed(1)
    onelora.save_adapter(onelora.adapt(zoo.MLP()), project / "other.safetensors")
    done = onelora_command("export", "mymodels:make", "-o", "m.onnx", "--adapter", "other.safetensors", cwd=project)
    assert done.returncode == 1
    assert "does not have: a, b, c" in done.stderr


@pytest.mark.slow
def test_engine_without_a_gpu(project):
    """From a model to an engine for another machine, by commands alone."""
    pytest.importorskip("tensorrt_rtx_bindings")
    made = onelora_command("export", "mymodels:make", "-o", "m.onnx", "--adapter", "a.safetensors", cwd=project)
    assert made.returncode == 0, made.stderr
    built = onelora_command("engine", "m.onnx", "-o", "m.engine", "--sm", "86", "--size", "batch=1,8,32", cwd=project)
    assert built.returncode == 0, built.stderr
    assert "sm_86" in built.stdout
    assert (project / "m.engine").stat().st_size > 1000
    shown = run("inspect", project / "m.engine").output
    for part in ("TensorRT-RTX 1.", "sm_86", "mode 'fold', 2 vectors", "m.onnx"):
        assert part in shown
    for arguments, message in (
        (("engine", "m.onnx", "-o", "n.engine", "--sm", "87"), "builds for sm_75"),
        (
            ("engine", "m.onnx", "-o", "n.engine", "--sm", "86", "--size", "batch"),
            "is not of the form batch=8, batch=1,8,32",
        ),
        (("refit", "m.engine", "a.safetensors"), "can't be refitted (mode 'fold')"),
    ):
        done = onelora_command(*arguments, cwd=project)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (project / "n.engine").exists()


def test_a_command_writes_over_none_of_its_inputs(project):
    import numpy as np

    assert run_in(project, "export", "mymodels:make", "-o", "m.onnx").exit_code == 0
    np.savez(project / "c.npz", x=np.ones(2))
    before = {path.name: path.read_bytes() for path in project.iterdir()}
    for command in (
        ("export", "mymodels:make", "-o", "mymodels.py"),
        ("export", "mymodels:make", "--adapter", "a.safetensors", "-o", "a.safetensors"),
        ("fold", "m.onnx", "a.safetensors", "-o", "c.npz", "--calibration", "c.npz"),
        ("fold", "m.onnx", "a.safetensors", "-o", "a.safetensors"),
        ("convert", "a.safetensors", "-o", "a.safetensors"),
        ("combine", "a.safetensors:0.5", "-o", "a.safetensors"),
        ("bundle", "m.onnx", "-o", "m.onnx"),
        ("engine", "m.onnx", "-o", "m.onnx"),
    ):
        done = run_in(project, *command)
        assert "would overwrite the input" in str(done.exception), command
        assert {path.name: path.read_bytes() for path in project.iterdir() if path.is_file()} == before


def test_combine_says_what_it_added_and_inspect_too(project):
    shutil.copy(project / "a.safetensors", project / "with:colon 1.safetensors")
    done = run_in(project, "combine", "a.safetensors:1.5", "with:colon 1.safetensors:-.5e0", "-o", "mix.safetensors")
    assert done.exit_code == 0
    held, mix = load_file(project / "a.safetensors"), load_file(project / "mix.safetensors")
    for name, vector in held.items():
        assert torch.equal(mix[name], vector)
    assert "wrote mix.safetensors, " in done.output
    assert ": 2 vectors, 5 numbers" in done.output
    for shown in (done.output, run_in(project, "inspect", "mix.safetensors").output):
        for part in ("1.5", "a.safetensors", "-0.5", "with:colon 1.safetensors"):
            assert part in shown
    assert "the same" in done.output
    minus = run_in(project, "combine", "a.safetensors:-1", "-o", "minus.safetensors", "--json")
    report = json.loads(minus.stdout)
    assert [(one["weight"], one["name"], one["compared"]) for one in report["parts"]] == [(-1.0, "a.safetensors", True)]


def test_combine_says_once_that_a_base_could_not_be_checked(project):
    assert run_in(project, "convert", "a.safetensors", "-o", "folder").exit_code == 0
    peft_folders.edit_tensors(project / "folder", lambda tensors: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = run_in(project, "combine", "a.safetensors:1", "folder:1", "-o", "mix.safetensors")
    assert done.exit_code == 0
    assert "could not be checked" in done.output
