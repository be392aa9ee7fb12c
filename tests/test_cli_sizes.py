"""Sizes, dynamic axes and names on the command line."""

import onnx
import pytest
from command_line import run_in

import onelora_compile as onelora
from onelora_compile.cli.sizes import each_size, parse_axes, parse_sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch=1,8,32", {"batch": ((1,), (8,), (32,))}),
        ("batch=4", {"batch": ((4,),) * 3}),
        ("x=1x3,8x3,32x3", {"x": ((1, 3), (8, 3), (32, 3))}),
        ("a=b=2x3", {"a=b": ((2, 3),) * 3}),
        ("x:0=3", {"x:0": ((3,),) * 3}),
    ],
)
def test_sizes(text, expected):
    assert parse_sizes([text]) == expected
    assert len(list(each_size(expected))) == (3 if "," in text else 1)


@pytest.mark.parametrize(
    "text",
    ["batch", "=3", "batch=", "batch=-1", "batch=1,2", "batch=3,2,1", "x=1x2,3,4", "x=1x", "x=²", "x=1 ", "x=1:2:3"],
)
def test_what_is_no_size(text):
    with pytest.raises(onelora.ConfigError, match="--size"):
        parse_sizes([text])


@pytest.mark.parametrize("text", ["batch", "0=", "x=0", "-1=batch", "0=1x", "0:x=batch", "x:y=batch", "x:0=a b"])
def test_what_is_no_axis(text):
    with pytest.raises(onelora.ConfigError, match="--dynamic"):
        parse_axes([text])


NETS = """
import torch
class Net(torch.nn.Module):
    def __init__(self, fixed=False):
        super().__init__()
        torch.manual_seed(0)
        self.l, self.fixed = torch.nn.Linear(4, 3), fixed
    def forward(self, ids, extra=None, *, mask):
        y = self.l(ids) + extra["a"] * mask.unsqueeze(-1)
        return y.relu() if self.fixed and ids.shape[0] == 2 else y
def inputs(rows):
    return (torch.randn(rows, 5, 4), {"a": torch.randn(3)}), {"mask": torch.ones(rows, 5)}
def one(): return Net(), *inputs(1)
def two(): return Net(), *inputs(2)
def three(): return Net(), *inputs(3)
def single(): return Net(fixed=True), *inputs(1)
def fixed(): return Net(fixed=True), *inputs(2)
"""


def test_dynamic_axes(tmp_path):
    (tmp_path / "mymodels.py").write_text(NETS)
    assert run_in(tmp_path, "export", "mymodels:one", "-o", "m.onnx", "--dynamic", "1=tokens").exit_code == 0
    assert dims(tmp_path / "m.onnx") == [["batch", "tokens", 4], [3], ["batch", "tokens"]]
    for name in ("one", "two", "three"):
        assert run_in(tmp_path, "verify", "m.onnx", f"mymodels:{name}").exit_code == 0
    done = run_in(tmp_path, "verify", "m.onnx", "m.onnx", "--size", "batch=1,2,3", "--size", "tokens=7")
    assert [f"[{rows}, 7, 4]" in done.output for rows in (1, 2, 3)] == [True] * 3
    done = run_in(
        tmp_path, "export", "mymodels:two", "-o", "s.onnx", "--static", "--dynamic", "mask:1=t", "--dynamic", "ids:1=t"
    )
    assert done.exit_code == 0
    assert dims(tmp_path / "s.onnx") == [[2, "t", 4], [3], [2, "t"]]


def test_names_of_inputs_and_outputs(tmp_path):
    import onnx

    (tmp_path / "mymodels.py").write_text(NETS)
    names = ("--input-name", "mask=attention", "--output-name", "output=logits")
    assert run_in(tmp_path, "export", "mymodels:fixed", "-o", "m.onnx", "--static", *names).exit_code == 0
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert ([one.name for one in graph.input], [one.name for one in graph.output]) == (
        ["ids", "extra.a", "attention"],
        ["logits"],
    )
    done = run_in(tmp_path, "export", "mymodels:fixed", "-o", "n.onnx", "--input-name", "pixels")
    assert done.exit_code == 1
    assert "--input-name 'pixels': write the name that it has and the one it gets" in str(done.exception)


def test_a_model_that_has_one_batch_size(tmp_path):
    (tmp_path / "mymodels.py").write_text(NETS)
    done = run_in(tmp_path, "export", "mymodels:fixed", "-o", "m.onnx")
    assert isinstance(done.exception, onelora.ExportError)
    for part in ("not with dynamic 'batch'", "--static exports it so", "specialized it to be a constant (2)"):
        assert part in str(done.exception)
    assert run_in(tmp_path, "export", "mymodels:fixed", "-o", "m.onnx", "--static").exit_code == 0
    done = run_in(tmp_path, "export", "mymodels:single", "-o", "m.onnx")  # of the example itself, one row
    assert "batch != 2" in done.output
    assert run_in(tmp_path, "verify", "m.onnx", "mymodels:three").exit_code == 0


def dims(path):
    inputs = onnx.load(path).graph.input
    return [[one.dim_param or one.dim_value for one in value.type.tensor_type.shape.dim] for value in inputs]
