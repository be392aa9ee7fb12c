"""The package as a user gets it: names, wheel, optional dependencies, no second copy."""

import doctest
import importlib
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import onelora_compile as onelora
import onelora_compile.exporters
import onelora_compile.passes

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "OneLoRAConfig", "adapt", "detach", "disabled", "explain", "load_adapter", "merge", "save_adapter", "summary",
    "trainable_parameters", "vectors",
}  # fmt: skip


def test_the_contract_is_public_and_all_is_true():
    assert set(onelora.__all__) >= PUBLIC
    assert all(hasattr(onelora, name) for name in onelora.__all__)
    exported = {name for name, value in vars(onelora).items() if getattr(value, "__module__", "").startswith("onelora")}
    private = {"__getattr__", "__dir__", "_load"}  # by which names are loaded at their first use
    assert exported - private <= set(onelora.__all__)


def test_every_public_function_has_a_docstring():
    for name in onelora.__all__:
        assert name == "__version__" or getattr(onelora, name).__doc__, name


def test_examples_in_docstrings():
    for package in (onelora, onelora.passes, onelora.exporters):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not info.ispkg and not info.name.endswith("__main__"):
                results = doctest.testmod(importlib.import_module(info.name))
                assert results.failed == 0, info.name


def test_passes_and_exporters_have_one_name():
    assert Path(onelora_compile.passes.__file__).parent == ROOT / "passes"
    assert Path(onelora_compile.exporters.__file__).parent == ROOT / "exporters"


def test_the_wheel_holds_the_mapped_folders(tmp_path):
    source = tmp_path / "source"  # a copy: building leaves a build folder behind, whose files the next wheel would hold
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "onelora-demo")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        entry_points = next(file.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    for folder, package in (("passes", "onelora_compile/passes"), ("exporters", "onelora_compile/exporters")):
        files = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert {f"{package}/{path}" for path in files} <= set(names)
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "onelora_compile").rglob("*.py")}
    assert sources <= set(names)
    assert "onelora_compile/py.typed" in names
    assert not any(name.startswith(("passes/", "exporters/", "tests/", "benchmarks/")) for name in names)
    assert "[torch_dynamo_backends]\nonelora = onelora_compile.backend:onelora_backend" in entry_points


EXTRAS = ["onnx", "onnxruntime", "transformers", "peft", "huggingface_hub", "gguf", "sklearn", "matplotlib"]
EXTRAS += ["tensorrt_rtx_bindings"]


# One by one: nothing may take one of them for another.
@pytest.mark.parametrize("packages", [EXTRAS, *([one] for one in EXTRAS)], ids=",".join)
def test_importing_needs_none_of_the_extras(packages):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
        "import onelora_compile, onelora_compile.exporters, onelora_compile.passes, onelora_compile.backend\n"
        "import onelora_compile.cli, onelora_compile.examples.digits.run, onelora_compile.examples.sentences.run\n"
        "import torch; onelora_compile.adapt(torch.nn.Linear(2, 2))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_one_room_touches_private_dynamo_or_inductor_api():
    private = ("torch._dynamo.", "torch._inductor.", "from torch._dynamo", "from torch._inductor")
    told_of = "onelora_compile/backend/options.py"  # in a docstring
    for folder in ("onelora_compile", "passes", "exporters"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name != told_of and not name.startswith("onelora_compile/dynamo/") and "examples" not in name:
                assert not any(word in path.read_text() for word in private), name
