"""`make gpu` on a machine without a GPU: every path that has a meaning there, what is kept, and what is said of it."""

import contextlib
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import parts, run, swaps, training, verdicts

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"
Row = dict[str, Any]


def rows_of(file):
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def test_one_part_on_a_cpu(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", "--small", "--only", "onnx_cuda", "engines"]
    done = subprocess.run([*command, "--out", str(tmp_path / "gpu.csv")], capture_output=True, text=True, check=True)
    found = rows_of(tmp_path / "gpu.csv")
    assert [row["note"] for row in found if row["what"] == "part"] == ["skipped: needs a CUDA GPU", "done"]
    runs = [row for row in found if row["error_ratio"]]
    assert len(runs) == 4
    assert all(float(row["error_ratio"]) <= 2 for row in runs)
    assert {row["mode"] for row in runs} == {"fold", "load", "input", "bank"}
    assert all(row["torch"] and row["commit"] and row["run_on"] == "cpu" for row in found)
    assert "skipped, needs a CUDA GPU" in done.stdout
    assert "not run" in done.stdout


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", "--small", "--minutes", "30"]
    subprocess.run([*command, "--out", str(tmp_path / "gpu.csv")], check=True)
    found = rows_of(tmp_path / "gpu.csv")
    assert {row["part"] for row in found} == {part.name for part in parts.PARTS}
    assert not [row["note"] for row in found if row["note"].startswith("failed")]
    assert {row["new_graphs"] for row in found if row["what"] == "switch"} == {"0"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_what_there_is():
    done = subprocess.run([sys.executable, FOLDER / "run.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "PyTorch sees no CUDA GPU here; --device cpu --small walks the same paths on the CPU"
    ]


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("yield {'what': 'x', 'n': 1}; raise RuntimeError('out of memory')", "failed: RuntimeError: out of memory"),
        ("yield {'what': 'x', 'n': 1}; import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed: "),
        ("yield {'what': 'x', 'n': 1}; import time; time.sleep(60)", "stopped after 4 s"),
    ],
)
def test_what_a_part_measured_before_it_ended_is_kept(code, end, tmp_path, monkeypatch):
    (tmp_path / "broken_part.py").write_text(f"def rows(device, small):\n    {code}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, last = run.run_part(parts.Part("broken_part", 4), "cpu", True, 4)
    assert first == {"part": "broken_part", "what": "x", "n": 1}
    assert last["note"].startswith(end)


def test_a_switch_is_compared_with_the_base_and_looked_at_for_addresses():
    row = next(swaps.rows("cpu", True))
    assert row["error_ratio"] <= 2
    assert (row["new_graphs"], row["new_addresses"]) == (0, 0)


def test_a_disabled_block_that_is_not_the_base_is_seen(monkeypatch):
    monkeypatch.setattr("onelora_compile.disabled", lambda model: contextlib.nullcontext())
    assert next(swaps.rows("cpu", True))["error_ratio"] > 2


def test_what_is_missing_is_named():
    part = parts.Part("x", 1, ("torch", ("no_such_module", "nor_this_one")))
    assert run.missing(part, "cpu") == "no_such_module or nor_this_one is not installed"
    assert run.missing(parts.Part("x", 1, ("torch", ("no_such_module", "torch"))), "cpu") == ""


def test_what_a_part_goes_without_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    first = next(training.rows("cpu", True))
    run.show([{"part": "training", **first}])
    assert "MiSS and LoRA of PEFT: skipped, peft is not installed" in " ".join(capsys.readouterr().out.split())


def step(way, ratio, peak, **more):
    row = {"part": "training", "what": "training step", "mode": "compiled", "block": "ViT-L", "way": way}
    return row | {"ratio": ratio, "peak_bytes": peak} | more


def said(rows, text):
    (claim,) = (claim for claim in verdicts.CLAIMS if text in claim.text)
    return verdicts.verdict(claim, verdicts.prepared(rows))


def test_verdicts():
    base, rival = step("frozen base", 1.0, 100), step("LoRA r=1 (PEFT)", 1.2, 150)
    good, bad = step("1LoRA", 1.02, 103), step("1LoRA", 1.3, 130)
    for text, number in (("The memory", "1.300"), ("costs at most", "1.300"), ("PEFT's MiSS", "1.300, the better")):
        assert said([base, rival, good], text)[0] == "holds"
        verdict, by = said([base, rival, bad], text)
        assert verdict == "does not hold"
        assert number in by
        assert said([base, rival], text) == ("not run", "")
    assert said([good], "The memory") == ("not run", "")  # the frozen base ended before it was measured
    cut = {"part": "training", "what": "part", "note": "stopped after 9 s"}
    assert said([base, good, cut], "The memory")[0] == "holds as far as it ran"
    switch = {
        "part": "swaps",
        "what": "switch",
        "block": "ViT-L",
        "mode": "default",
        "error_ratio": 2.1,
        "new_graphs": 1,
        "new_addresses": 0,
    }
    assert said([switch], "One function")[0] == "does not hold"
    assert said([switch], "graphs don't")[0] == "does not hold"
    assert said([switch | {"new_graphs": 0}], "graphs don't")[0] == "holds"
    assert said([switch | {"new_graphs": 0, "new_addresses": 2}], "graphs don't")[0] == "does not hold"
    call = {"part": "engines", "what": "engine call", "block": "ViT-L", "way": "load", "ratio": 1.1}
    assert said([call], "Zero cost") == ("does not hold", "1 of 1: ViT-L load: 1.100")
    # The update is beside the matmul there, as in mode input.
    assert said([{**call, "way": "refit"}], "Zero cost")[0] == "not run"
    skipped = {"part": "gpu_tests", "what": "tests", "skipped": 21, "note": "21 skipped"}
    assert said([skipped], "tests that need a GPU")[0] == "not run"
    assert said([{**skipped, "passed": 20, "failed": 1}], "tests that need a GPU")[0] == "does not hold"


def test_the_files_that_the_list_names_are_there():
    assert {path.stem for path in FOLDER.glob("*.py")} == {part.name for part in parts.PARTS} | {
        *("run", "parts", "verdicts", "blocks", "__init__")
    }
