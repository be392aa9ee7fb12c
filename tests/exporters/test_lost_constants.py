"""Constants that float16 makes zero or infinite: what reads them stays in float32, whatever `keep_float32` says."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from half_evaluator import evaluate
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx, ranges
from onelora_compile.exporters.half.convert import to_float16
from onelora_compile.exporters.half.lost import LOST
from onelora_compile.testing import assert_parity, fill_vectors

GUARDS = {
    "sum": lambda h, tiny: h / (h.norm(dim=-1, keepdim=True) + 1e-8),
    "root": lambda h, tiny: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-12),
    "reciprocal": lambda h, tiny: h * (h.abs().amax(-1, keepdim=True) + 1e-8).reciprocal(),
    "clamp": lambda h, tiny: h / h.abs().amax(-1, keepdim=True).clamp(min=1e-12),
    "where": lambda h, tiny: h / torch.where(h.abs().sum(-1, keepdim=True) == 0, 1e-9, 1.0),
    "normalize": lambda h, tiny: nn.functional.normalize(h, dim=-1),
    "buffer": lambda h, tiny: h / (h.abs() + tiny),
    "large": lambda h, tiny: (h * 1e6).tanh(),
}


class Guarded(nn.Module):
    def __init__(self, guard):
        super().__init__()
        self.first, self.last, self.guard = nn.Linear(8, 8, bias=False), nn.Linear(8, 4), GUARDS[guard]
        self.register_buffer("tiny", torch.full((1, 8), 1e-8))

    def forward(self, x):
        return self.last(self.guard(self.first(x), self.tiny))


def assert_held(y, model, x):
    """The output for x in float16 is near that in float64: as near as of linears in float16 with a guard in float32."""
    half, x = copy.deepcopy(model).half(), x.half()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        plain = half.last(half.guard(half.first(x).float(), model.tiny).half())
    assert_parity(torch.from_numpy(y), exact, plain)


@pytest.mark.parametrize("keep", [None, "auto", ["*linear_1*"]])
@pytest.mark.parametrize("guard", GUARDS)
def test_a_number_that_guards_a_division_holds_for_a_row_of_zeros(guard, keep, tmp_path):
    torch.manual_seed(0)
    model, x = Guarded(guard).eval(), torch.randn(3, 8)
    report = export_onnx(model, (x,), tmp_path / "m.onnx", dtype=torch.float16, keep_float32=keep, progress=False)
    assert report.mixed is not None
    assert keep == "auto" or any(LOST in reason for reason in report.mixed.operators.values()), report.mixed
    x[1] = 0
    found = onnx.load(tmp_path / "m.onnx")
    (name,) = [one.name for one in found.graph.input]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for (y,) in (evaluate(found, **{name: x.half().numpy()}), session.run(None, {name: x.half().numpy()})):
        assert_held(y, model, x)


@pytest.mark.parametrize("mode", ["fold", "input", "load", "bank"])
def test_it_holds_in_every_mode_of_an_adapter(mode, tmp_path):
    torch.manual_seed(0)
    model, x = Guarded("sum").eval(), torch.randn(3, 8)
    onelora.adapt(model)
    onelora.save_adapter(fill_vectors(model, 0.1), tmp_path / "a.safetensors")
    bank = [tmp_path / "a.safetensors"] if mode == "bank" else ()
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode, dtype=torch.float16, bank=bank, progress=False)
    x[1] = 0
    found = onnx.load(tmp_path / "m.onnx")
    feed = {found.graph.input[0].name: x.half().numpy()}
    (y,) = evaluate(found, **feed, **({"adapter_ids": np.zeros(3, np.int64)} if mode == "bank" else {}))
    assert_held(y, model, x)


def test_without_such_a_number_everything_is_float16(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, eps=1e-12), nn.Linear(8, 4)).eval()
    report = export_onnx(model, (torch.randn(3, 8),), tmp_path / "m.onnx", dtype=torch.float16, progress=False)
    assert report.mixed is None


def graph(tiny):
    """x / (|x| + tiny), the number given by a node of each kind."""
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[3] x) => (float[3] y) {{ {tiny} a = Abs(x) s = Add(a, e) y = Div(x, s) }}"""
    return ir.from_onnx_text(text)


@pytest.mark.parametrize(
    "tiny",
    [
        "e = Constant<value = float {1e-8}>()",
        "e = Constant<value_float = 1e-8>()",
        "d = Constant<value = double {1e-8}>() e = Cast<to = 1>(d)",
        "n = Constant<value_ints = [1]>() e = ConstantOfShape<value = float[1] {1e-8}>(n)",
        "d = Constant<value = float {1e-8}>() n = Constant<value_ints = [3]>() e = Expand(d, n)",
    ],
)
def test_every_way_to_write_a_constant_is_seen(tiny):
    model = graph(tiny)
    mixed = to_float16(model, (), dict)
    (y,) = evaluate(model, x=np.array([0, 1, -2], np.float16))
    np.testing.assert_array_equal(y, np.array([0, 1, -1], np.float16))
    assert any(LOST in reason for reason in mixed.operators.values())


def test_what_stays_reads_a_constant_node_that_was_never_rounded():
    model = graph("e = Constant<value = float {0.1}>()")
    to_float16(model, "s", dict)
    (node,) = [node for node in model.graph if node.op_type == "Add"]
    held = node.inputs[1]
    assert held is not None
    tensor = ir.convenience.get_const_tensor(held)
    assert tensor is not None
    assert tensor.numpy() == np.float32(0.1)


def test_the_table_of_ranges_names_the_constants_that_become_zero(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ir.save(graph("e = Constant<value = float {1e-8}>()"), tmp_path / "m.onnx")
    report = ranges(tmp_path / "m.onnx", {"x": np.ones(3, np.float32)})
    assert report.tensors["e"].vanished == 1
    (line,) = [line for line in str(report).splitlines() if " e " in line]
    assert "zero in float16" in line
