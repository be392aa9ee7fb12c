"""The demo runs, in its quick form, and writes what it says."""

import collections
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from eval import stages, store

import onelora_compile as onelora
from onelora_compile.errors import MissingExtraError, OneLoRAError
from onelora_compile.examples.sentences import data
from onelora_compile.examples.sentences.methods import METHODS
from onelora_compile.examples.sentences.rates import RATES
from onelora_compile.exporters import OnnxRunner


@pytest.mark.slow
def test_quick_demo(tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-W", "error::UserWarning", "-m", "onelora_compile", "demo", "--quick", "-o", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if not line.endswith(" …")] == []  # stages, no warnings
    found = json.loads((folder / "results.json").read_text())
    for name in found["files"]:
        assert (folder / name).stat().st_size > 1000, name
        assert name in done.stdout.replace("\n", "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert [row["name"] for row in found["rows"]] == ["head only", "BitFit", "1LoRA", "LoRA r=1", "full fine-tuning"]
    assert found["swap"]["recompiled"] == 0
    assert found["swap"]["disabled_is_base"]
    assert found["fold"]["nodes"] == found["fold"]["base_nodes"]
    assert found["bank"]["rows"] == 60
    assert found["bank"]["difference"] < 1e-4
    assert max(task["bytes"] for task in found["tasks"].values()) < 100_000
    page, spoken = (folder / "report.html").read_text(), " ".join(done.stdout.split())
    for text in (spoken, page):
        assert ("built by TensorRT-RTX" if found["engine"]["built_by"] else "no engine was built") in text
    assert not re.search(r'(src|href)="http', page)
    assert page.count("<svg") == 3
    assert "prefers-color-scheme: dark" in page
    if importlib.util.find_spec("tensorrt_rtx_bindings"):
        assert found["engine"]["bytes"] > 1e6
    # The bank answers each row as the file of its task does, for whoever opens it.
    tokens = torch.tensor([[101, 2023, 2003, 2204, 102]] * 4)
    runner = OnnxRunner(folder / "bank.onnx")
    mixed = runner.run([tokens.numpy(), np.ones((4, 5), np.int64)], adapter_ids=[0, 1, 2, -1])[0]
    assert len({tuple(row) for row in mixed.round(6).tolist()}) == 4
    assert "encoder.encoder.layer.0.attention.self.query" in onelora.read_adapter(folder / "films.safetensors").vectors


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "onelora-compile" / data.ARCHIVE


def test_another_archive_is_refused(elsewhere):
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"something else")
    with pytest.raises(OneLoRAError, match=r"is not the vaderSentiment-3\.3\.2"):
        data.load_tasks()


def test_what_pip_can_not_download_is_told(elsewhere, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(elsewhere.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(MissingExtraError, match=r"pip could not download it .*put it at .*vaderSentiment-3.3.2.tar.gz"):
        data.load_tasks()


def test_no_review_or_article_is_in_two_parts_of_a_task():
    with data.opened() as files:
        groups = {source.name: data.read_rows(files, source) for source in data.SOURCES}
    for task in data.load_tasks():
        parts = [set(part.texts) for part in (task.train, task.validation, task.test)]
        assert [len(part.labels) for part in (task.validation, task.test)] == [data.VALIDATION, data.TEST]
        assert len(task.train.labels) > 1000
        assert 0.25 < sum(task.test.labels) / len(task.test.labels) < 0.75
        times = collections.Counter(text for _, _, text in groups[task.name])
        where: dict[str, set[int]] = {}
        for group, _, text in groups[task.name]:
            if times[text] == 1:  # "thank you" is in several
                where.setdefault(group, set()).update(i for i, part in enumerate(parts) if text in part)
        assert max(map(len, where.values())) == 1


def test_rates_are_those_that_the_evaluation_chose():
    for method in list(METHODS)[1:]:  # the head has the same rate in all
        runs = store.read(store.RESULTS, "films", "validation", method)
        assert len(runs) > 1, method
        assert stages.best(runs, "accuracy")["rate"] == RATES[method], method
