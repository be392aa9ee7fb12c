"""What a user meets first: help, version, completion, and the examples in the help."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from torch import nn
from typer.main import get_command

import onelora_compile as onelora
from onelora_compile.cli import app, choices, main
from onelora_compile.exporters import build_engine, bundle, export_onnx, export_runtime
from onelora_compile.testing import fill_vectors

GROUP: Any = get_command(app)
COMMANDS = GROUP.commands
EXAMPLES = {
    line.strip(): name
    for name, command in COMMANDS.items()
    for line in command.epilog.splitlines()
    if line.strip().startswith("onelora ")
}
GPU, MINUTES = {"refit"}, {"bench", "demo"}  # what an example of these needs


def python(code, *arguments, **environment):
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_that_helps_waits_for_torch():
    """Version, every help, every wrong word; a shell asks for them at each TAB."""
    code = """
import sys
sys.argv[0] = "/usr/bin/onelora"
from onelora_compile.cli import main
import json
for words in json.loads(sys.argv[1]):
    try: main(words)
    except SystemExit as left: print("left with", left.code)
    assert "torch" not in sys.modules, words
    assert "onnx" not in sys.modules and "numpy" not in sys.modules, words
"""
    words = [["--version"], ["-h"], ["--help"], [], ["frobnicate"], ["export"], ["export", "a:b", "-o", "c", "--x"]]
    words += [[name, flag] for name in COMMANDS for flag in ("-h", "--help")]
    said = python(code, json.dumps(words))
    codes = re.findall("left with (.*)", said)
    assert codes == ["0"] * 3 + ["2"] * 4 + ["0"] * 2 * len(COMMANDS)
    assert said.startswith(f"{onelora.__version__}\nleft")


def test_a_module_is_the_same_command():
    done = subprocess.run([sys.executable, "-P", "-m", "onelora_compile", "fold", "-h"], capture_output=True, text=True)
    assert done.stdout.startswith("Usage: onelora fold ")
    script = os.path.join(os.path.dirname(sys.executable), "onelora")
    if os.path.exists(script):
        assert subprocess.run([script, "fold", "-h"], capture_output=True, text=True).stdout == done.stdout


def test_names_are_there_without_torch_and_with_it():
    lazy = "import sys; sys.argv[0] = 'onelora'; import onelora_compile as o; assert 'torch' not in sys.modules; "
    lazy += "o.adapt; from onelora_compile import *; "
    assert python(lazy + "print(vectors.__name__, set(o.__all__) <= set(dir(o)))") == "vectors True\n"
    # As isort orders them: a program that loads an exported one asks for no name of this package.
    for first, then in (("torch", "onelora_compile"), ("onelora_compile", "torch")):
        said = python(f"import {first}; import {then}; print(hasattr(torch.ops.onelora, 'rank1_update'))")
        assert said == "True\n"
    with pytest.raises(AttributeError, match="has no attribute 'adopt'"):
        onelora.adopt  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_and_how(name):
    command = COMMANDS[name]
    assert name in EXAMPLES.values()
    for parameter in command.params:
        assert parameter.help or "--help" in parameter.opts, parameter.name
    assert len(command.short_help) <= 64  # longer ones are cut off in the list of commands


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_right_by_the_parser(example):
    name, *words = shlex.split(example)[1:]
    assert EXAMPLES[example] == name
    COMMANDS[name].make_context(name, words)
    with pytest.raises(Exception, match="No such option"):
        COMMANDS[name].make_context(name, [*words, "--no-such-option"])


USER = """
import os, torch
def make():
    print("a line of the user's")
    os.write(1, b"a line of a library's\\n")
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), (torch.randn(2, 5, 4),)
"""


KEY = """-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f
-----END PRIVATE KEY-----
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "mymodels.py").write_text(USER)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(2, 5, 4)
    onelora.save_adapter(fill_vectors(onelora.adapt(model)), folder / "a.safetensors")
    export_onnx(model, (x,), folder / "input.onnx", adapters="input", dynamic_shapes=({0: "batch"},))
    llama = gguf_files.model_of("llama")
    llama.config.save_pretrained(folder / "base_folder")
    onelora.save_adapter(onelora.adapt(llama), folder / "llm.safetensors")
    (folder / "key.pem").write_text(KEY)
    np.savez(folder / "inputs.npz", input=x.numpy())
    return folder


def json_of(words, capfd, code=None):
    """What a command prints with --json: one object, and nothing beside it."""
    with pytest.raises(SystemExit) as left:
        main([*words, "--json"])
    said = capfd.readouterr()
    assert left.value.code == code, said.err
    assert "Traceback" not in said.err
    found = json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(found, dict)
    return found, said.err


KEYS = {
    "inspect": {"file", "bytes", "vectors"},
    "export": {"files", "bytes", "mode", "vectors", "parity", "seconds"},
    "fold": {"files", "folded", "skipped", "saturation"},
    "convert": {"file", "bytes"},
    "combine": {"file", "bytes", "parts", "vectors", "numbers", "saved"},
    "ranges": {"file", "tensors", "before", "passed"},
    "verify": {"comparisons", "passed"},
    "engine": {"files", "bytes", "manifest", "losses"},
    "bundle": {"folder", "jetpack", "checks"},
    "sign": {"file", "signature", "sequence"},
    "diagnose": {"layers", "loss", "norms"},
    "doctor": {"version", "parts"},
}


def test_the_examples_run_and_their_reports_are_data(project, capfd, monkeypatch):
    """In the order of the help: one makes what the next one reads."""
    monkeypatch.chdir(project)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    waiting = [one for one, name in EXAMPLES.items() if name not in GPU | MINUTES]
    try:
        import tensorrt_rtx_bindings  # noqa: F401
    except ImportError:
        waiting = [one for one in waiting if EXAMPLES[one] != "engine"]
    if importlib.util.find_spec("cryptography") is None:
        waiting = [one for one in waiting if EXAMPLES[one] != "sign"]
    waiting.sort(key=lambda one: "inspect model.onnx" in one)  # after the export of it
    for example in waiting:
        words = [word for word in shlex.split(example)[1:] if word != "--json"]
        found, said = json_of(words, capfd)
        assert KEYS[EXAMPLES[example]] <= set(found), example
        if "mymodels:make" in words:
            assert "a line of the user's" in said
            assert "a line of a library's" in said
    sys.modules.pop("mymodels", None)
    assert {"model.onnx", "base.onnx", "folded.onnx", "a.onnx_adapter", "bundle"} <= set(os.listdir())


def test_a_difference_is_data_and_exit_code_one(project, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    export_onnx(Nan(), (torch.randn(2, 4),), tmp_path / "nan.onnx", verify=False)
    export_onnx(nn.ReLU(), (torch.randn(2, 4),), tmp_path / "relu.onnx")
    found, _ = json_of(["verify", str(tmp_path / "nan.onnx"), str(tmp_path / "relu.onnx")], capfd, code=1)
    assert found["passed"] is False
    (parity,) = found["comparisons"][0]["parities"]
    assert parity["relative"] is None  # JSON has no NaN
    assert parity["tolerance"] == 1e-4
    assert parity["passed"] is False


def test_a_mistake_leaves_the_stream_of_the_json_empty(project, capfd, monkeypatch):
    monkeypatch.chdir(project)
    for words, code in ((["inspect", "gone"], 1), (["inspect"], 2), (["verify", "input.onnx", "gone.onnx"], 1)):
        with pytest.raises(SystemExit) as left:
            main([*words, "--json"])
        said = capfd.readouterr()
        assert (left.value.code, said.out, len(said.err.splitlines())) == (code, "", 1)


class Nan(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_numbers_of_a_report_are_numbers(capfd, project):
    found, _ = json_of(["inspect", str(project / "a.safetensors")], capfd)
    vector = found["vectors"]["0"]
    assert (vector["shape"], vector["base_shape"], vector["base_dtype"]) == ([3], [3, 4], "float32")
    values = np.asarray(onelora.read_adapter(project / "a.safetensors").vectors["0"], dtype=np.float64)
    assert vector["relative"] == pytest.approx(np.sqrt((values**2).sum() * 4) / vector["base_norm"], rel=1e-6)
    assert found["numbers"] == 5


OPTIONS = {
    ("export", "--to"): choices.Runtime,
    ("export", "--adapters"): choices.ExportMode,
    ("engine", "--adapters"): choices.EngineMode,
    ("engine", "--flavour"): choices.Flavour,
    ("engine", "--precision"): choices.Precision,
    ("bundle", "--jetpack"): choices.JetPack,
    ("bundle", "--swap"): choices.Swap,
    ("bundle", "--layout"): choices.BundleLayout,
}


@pytest.mark.slow
def test_a_shell_completes_commands_options_and_choices():
    def completed(*words):
        environment = {"_ONELORA_COMPLETE": "complete_bash", "COMP_CWORD": str(len(words) - 1)}
        return python("from onelora_compile.cli import main; main()", COMP_WORDS=" ".join(words), **environment).split()

    assert completed("onelora", "ex") == ["export"]
    assert completed("onelora", "fold", "--js") == ["--json"]
    for (command, option), values in OPTIONS.items():
        assert completed("onelora", command, option, "") == [one.value for one in values]
    script = python("from onelora_compile.cli import main; main()", _ONELORA_COMPLETE="source_zsh")
    assert "#compdef onelora" in script
    assert {"--install-completion", "--show-completion"} <= {one for p in get_command(app).params for one in p.opts}


def test_choices_are_those_of_the_exporters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, args = nn.Linear(4, 2), (torch.randn(2, 4),)
    export_onnx(model, args, "m.onnx", verify=False)
    asked = {
        ("export", "--to"): lambda: export_runtime(model, args, "m.pt2", runtime="glue"),
        ("export", "--adapters"): lambda: export_onnx(model, args, "n.onnx", adapters="glue"),
        ("engine", "--adapters"): lambda: build_engine("m.onnx", "m.engine", adapters="glue"),
        ("engine", "--flavour"): lambda: build_engine("m.onnx", "m.engine", flavour="glue"),
        ("engine", "--precision"): lambda: build_engine("m.onnx", "m.engine", precision="glue"),
        ("bundle", "--jetpack"): lambda: bundle("m.onnx", "b", jetpack="glue"),
        ("bundle", "--swap"): lambda: bundle("m.onnx", "b", swap="glue"),
        ("bundle", "--layout"): lambda: bundle("m.onnx", "b", layout="glue"),
    }
    pytest.importorskip("tensorrt_rtx_bindings")
    for option, call in asked.items():
        with pytest.raises(onelora.ConfigError) as raised:
            call()
        known = str(raised.value).partition(" is not one of ")[2].partition(". ")[0].replace("'", "").split(", ")
        values = [one.value for one in OPTIONS[option]]
        assert known == (values[1:] if option == ("export", "--to") else values), option  # onnx: export_onnx
