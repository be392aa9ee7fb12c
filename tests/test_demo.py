"""The demo runs, in its quick form, and writes what it says."""

import importlib.util
import json
import subprocess
import sys

import pytest

import onelora_compile as onelora


@pytest.mark.slow
def test_quick_demo(tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-W", "error::UserWarning", "-m", "onelora_compile", "demo", "--quick", "-o", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if not line.endswith(" …")] == []  # stages, no warnings
    assert "1LoRA" in done.stdout
    for name in ("digits-A.safetensors", "digits-B.safetensors", "digits.onnx", "report.html", "results.json"):
        assert (folder / name).stat().st_size > 1000, name
        assert name in done.stdout.replace("\n", "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    page = (folder / "report.html").read_text()
    engine = json.loads((folder / "results.json").read_text())["engine"]
    if importlib.util.find_spec("tensorrt_rtx_bindings"):
        assert engine["kernels"] == engine["base_kernels"] > 10
        assert (folder / "digits.engine").stat().st_size == engine["bytes"]
        assert (folder / "digits.engine.json").stat().st_size > 1000
        assert "digits.engine" in done.stdout.replace("\n", "")
    for text in (" ".join(done.stdout.split()), page):
        assert ("built by TensorRT-RTX" if engine["built_by"] else "no engine was built") in text
    assert 'src="http' not in page
    assert 'href="http' not in page.replace('href="https://arxiv.org', "")
    json.loads((folder / "results.json").read_text())
    assert "blocks.0.qkv" in " ".join(onelora.read_adapter(folder / "digits-A.safetensors").vectors)
