"""Tables: names stay whole at any width, equal layers are one row."""

import io
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import onelora_compile as onelora
from onelora_compile.exporters import Parity, Verification
from onelora_compile.printable import Printable
from onelora_compile.table import Table, grouped, spread
from onelora_compile.testing import fill_vectors

NAMES = [f"encoder.layer.{n}.attention.{part}" for n in range(12) for part in ("query", "key")] + ["classifier"]


def test_layers_that_differ_in_a_number_are_one_row():
    rows = [(name, 768 if "query" in name else 64) for name in NAMES]
    assert {name: len(ones) for name, ones in grouped(rows, alike=int).items()} == {
        "encoder.layer.{0..11}.attention.query": 12,
        "encoder.layer.{0..11}.attention.key": 12,
        "classifier": 1,
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0", "2", "3"], ["{0,2..3}"]),
        (["a.10.b", "a.9.b"], ["a.{9..10}.b"]),
        (["a.0.w", "a.1.w", "b.0.w"], ["a.{0..1}.w", "b.0.w"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1"], ["l.{0..1}.e.{0..1}"]),
        (["l.0.e.0", "l.1.e.0", "l.1.e.1"], ["l.{0..1}.e.0", "l.1.e.1"]),
        (["h0.w", "h1.w"], ["h0.w", "h1.w"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_what_a_group_is_called(names, expected):
    assert list(grouped((name, None) for name in names)) == expected


def test_a_group_stands_for_exactly_its_members():
    torch.manual_seed(0)
    for _ in range(50):
        names = {f"l.{a}.e.{b}.w" for a, b in torch.randint(0, 4, (int(torch.randint(1, 17, ())), 2)).tolist()}
        found = grouped((name, name) for name in names)
        assert sorted(itertools.chain(*found.values())) == sorted(names)
        for name, members in found.items():
            assert sorted(spelled_out(name)) == sorted(members)


def spelled_out(name):
    """The names that a pattern stands for."""
    parts = []
    for part in re.split(r"(\{.*?\})", name):
        if not part.startswith("{"):
            parts.append([part])
            continue
        runs = [run.split("..") for run in part[1:-1].split(",")]
        parts.append([str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)])
    return ["".join(one) for one in itertools.product(*parts)]


def test_names_that_differ_elsewhere_are_not_one_row():
    assert len(grouped([("l.0", 1), ("l.1", 2)], alike=int)) == 2


def test_spread():
    assert (spread([1.0], ".1f"), spread([1.0, 1.01], ".1f"), spread([3.0, 1.0], ".1f")) == ("1.0", "1.0", "1.0 to 3.0")


def printed(renderable, width, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=stream, width=width, markup=False).print(renderable, crop=False)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_word_is_broken(width, encoding):
    path = "/home/somebody/a_folder_with_a_name/model.onnx"
    table = Table("module", "vector", "norm of W", "a heading of some words", title=f"written to {path} (3 kB)")
    for name in grouped((name, None) for name in NAMES):
        table.add_row(name, "[768, 3072]", "1.25e-03 to 2.5e-02", "by its module [/red]")
    text = printed(table, width, encoding)
    for name in ("encoder", "layer.", "{0..11}", "attention", "query", "classifier", "1.25e-03", "2.5e-02", "3072]"):
        assert name in text, text
    for part in ("a_folder_with_a_name/", "model.", "heading", "[/red]"):
        assert part in text, text
    if width == 200:
        assert "encoder.layer.{0..11}.attention.query" in text
        assert path in text


def test_at_eighty_columns_a_model_fits():
    table = Table("module", "vector", "base weight", "base dtype", "norm of b 1ᵀ / norm of W")
    table.add_row("bert.encoder.layer.{0..11}.attention.self.query", "[768]", "[768, 768]", "float32", "1e-03 to 2e-03")
    assert max(map(len, printed(table, 80).splitlines())) <= 80


def test_reports_group_equal_layers():
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(12)])
    fill_vectors(onelora.adapt(model))
    assert str(onelora.summary(model)).count("{0..11}.0") == 1
    shown = str(onelora.explain(model, torch.randn(2, 8)))
    assert shown.count("{0..11}.0") == 1
    assert len(onelora.explain(model, torch.randn(2, 8)).sites) == 12
    assert str(onelora.merge(model)).count("{0..11}.0") == 1


def test_a_report_as_data():
    one = Verification([Parity(math.nan, math.inf, 1e-4, "y", 6)], {"x": (2, 3)})
    found = one.to_dict()
    assert found == {
        "parities": [
            {"absolute": None, "relative": None, "tolerance": 1e-4, "output": "y", "entries": 6, "passed": False}
        ],
        "inputs": {"x": [2, 3]},
        "passed": False,
    }
    model = onelora.adapt(torch.nn.Sequential(torch.nn.Linear(4, 3)))
    data = onelora.explain(model, torch.randn(2, 4)).to_dict()
    assert "captured" not in data
    assert "_row" not in data["sites"][0]
    assert json.loads(json.dumps(data, allow_nan=False))["sites"][0]["adapted"] is True


def test_what_values_become():
    import dataclasses

    @dataclasses.dataclass
    class Report(Printable):
        held: object

    values = (Path("a/b"), torch.float16, {1: (True, None)}, torch.tensor(2.5), torch.tensor(3).numpy()[()], {3})
    assert [Report(one).to_dict()["held"] for one in values] == ["a/b", "float16", {"1": [True, None]}, 2.5, 3, [3]]
