"""Axes that vary: by name where the model lets them, numbers where it does not."""

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import OnnxRunner, export_onnx, verify


class Model(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.first, self.second, self.form = nn.Linear(6, 4), nn.Linear(6, 4), form

    def forward(self, x, y):
        return self.form(self.first(x), self.second(y))


def export(model, x, folder, **options):
    report = export_onnx(model, x, folder / "m.onnx", progress=False, **options)
    return report, OnnxRunner(folder / "m.onnx")


BRANCHES = {
    "reshape": lambda rows: lambda a, b: a.reshape(rows, 4),
    "length": lambda rows: lambda a, b: a * 2 if len(a) == rows else a,
    "branch": lambda rows: lambda a, b: a * 2 if a.shape[0] == rows else a,
    "both": lambda rows: lambda a, b: a[:, None] + b if rows == a.shape[0] else a,
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("form", BRANCHES)
def test_a_size_that_the_model_fixes_is_a_number_in_the_file(form, rows, tmp_path):
    """Also 1, the example's: a file that claims any size and computes what is right for one would be silently wrong."""
    model, x = Model(BRANCHES[form](rows)), (torch.randn(rows, 6), torch.randn(rows, 6))
    with pytest.raises(ExportError, match=r"fixes axis 0|constant"):
        export(model, x, tmp_path, dynamic_shapes={"x": {0: "batch"}, "y": {0: "batch"}})
    assert not (tmp_path / "m.onnx").exists()
    _, runner = export(model, x, tmp_path, dynamic_shapes="batch")
    assert runner.session.get_inputs()[0].shape == [rows, 6]
    assert verify(runner, model, x).passed


@pytest.mark.parametrize("rows", [1, 2])
def test_a_size_that_the_model_leaves_free_is_a_name(rows, tmp_path):
    model, x = Model(lambda a, b: torch.cat([a, b[:1]])), (torch.randn(rows, 6), torch.randn(rows, 6))
    for shapes in ("batch", ({0: "batch"}, {0: "batch"}), {"x": ("batch", None), "y": {0: torch.export.Dim("batch")}}):
        _, runner = export(model, x, tmp_path, dynamic_shapes=shapes)
        assert [one.shape for one in runner.session.get_inputs()] == [["batch", 6]] * 2
        for size in (1, 2, 5):
            assert verify(runner, model, (torch.randn(size, 6), torch.randn(size, 6))).passed


CONDITIONS = {
    "below": (3, lambda n, _: n < 4, ["batch <= 3"]),
    "below, of one row": (1, lambda n, _: n < 4, ["batch <= 3"]),
    "above": (5, lambda n, _: n < 4, ["batch >= 4"]),
    "between": (5, lambda n, _: 3 < n < 7, ["batch >= 4", "batch <= 6"]),
    "even": (4, lambda n, _: n % 2 == 0, ["(batch % 2) == 0"]),
    "odd": (5, lambda n, _: n % 2 == 0, ["(batch % 2) != 0"]),
    "not this": (5, lambda n, _: n == 4, ["batch != 4"]),
    "not this, of one row": (1, lambda n, _: n == 4, ["batch != 4"]),
    "less than another": (3, lambda n, m: n < m, ["other >= 3", "batch < other"]),
    "any": (3, lambda n, m: n < 0 or m < 0, []),
}


@pytest.mark.parametrize("mode", ["fold", "input"])
@pytest.mark.parametrize("case", CONDITIONS)
def test_a_report_says_for_which_sizes_a_branch_was_captured(case, mode, tmp_path):
    """Inside them the file is the model, outside it is not: it has no branch to take."""
    rows, condition, expected = CONDITIONS[case]
    model = Model(lambda a, b: (a * 2 if condition(a.shape[0], b.shape[0]) else a) + b.sum())
    if mode == "input":
        onelora.adapt(model)
    shapes = {"x": {0: "batch"}, "y": {0: "other"}}
    report, runner = export(
        model, (torch.randn(rows, 6), torch.randn(9, 6)), tmp_path, dynamic_shapes=shapes, adapters=mode
    )
    assert report.captured_for == expected
    assert all(one in str(report) for one in expected)
    for batch in range(2, 9):
        for other in (3, 9):
            inside = all(eval(one, {"batch": batch, "other": other}) for one in expected)
            inputs = (torch.randn(batch, 6), torch.randn(other, 6))
            assert verify(runner, model, inputs).passed == inside


@pytest.mark.parametrize("form", ["captured", "refused"])
def test_inputs_have_no_marks_of_an_export(form, tmp_path):
    """Of a failed one too: `torch.compile` would take its axes for dynamic afterwards."""
    model = Model(lambda a, b: a.reshape(3, 4) + b if form == "refused" else a + b)
    x = (torch.randn(3, 6), torch.randn(3, 6))
    before = [set(vars(one)) for one in x]
    shapes = {"x": {0: "batch"}, "y": {0: "batch"}}
    if form == "refused":
        with pytest.raises(ExportError):
            export(model, x, tmp_path, dynamic_shapes=shapes)
    else:
        export(model, x, tmp_path, dynamic_shapes=shapes)
    assert [set(vars(one)) for one in x] == before
