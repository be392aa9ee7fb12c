"""Axes that vary: by name where the model lets them, numbers where it does not."""

import pytest
import torch
from torch import nn

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
