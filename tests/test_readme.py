"""The README's program runs as it is printed, and its commands exist."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_the_programs(number, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAMS[number])
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    for name in set(re.findall(r'"([a-z_]+\.(?:onnx|safetensors))"', PROGRAMS[number])):
        assert (tmp_path / name).exists(), name
    if number == 0:
        assert "vectors folded" in done.stdout
        assert (tmp_path / "a.safetensors").stat().st_size < 2000


def test_make_targets_and_links():
    for example in re.findall(r"-m (onelora_compile\.examples\.\w+)", README):
        assert importlib.util.find_spec(example), example
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert f"\n{target}:" in makefile, target
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_names_are_real():
    import onelora_compile as onelora

    for name in re.findall(r"onelora\.([a-zA-Z_]+)\(", README):
        assert hasattr(onelora, name), name
