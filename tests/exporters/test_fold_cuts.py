"""A file that cuts a weight up (packed q, k and v; halves of the inputs): folded whole, or refused by name."""

import numpy as np
import onnx
import pytest
import torch
from onnx_tools import adapter
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import OnnxRunner, fold_onnx
from onelora_compile.testing import fill_vectors, merged_copy

make, info, kinds = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto
OUT, IN, BATCH = 12, 8, 3


def cut(op, axis, stored, transposed):
    """Nodes that give p0, p1, p2 of "w", stored as it is or transposed, along its outputs (0) or inputs (1)."""
    axis = 1 - axis if transposed else axis
    length = stored.shape[axis]
    sizes = [length // 4, length // 4, length // 2]
    if op == "Split":
        return [make("Split", ["w", "sizes"], ["p0", "p1", "p2"], axis=axis)], {"sizes": np.array(sizes)}
    nodes, arrays, start = [], {"axis": np.array([axis])}, 0
    for number, size in enumerate(sizes):
        arrays |= {f"s{number}": np.array([start]), f"e{number}": np.array([start + size])}
        nodes.append(make("Slice", ["w", f"s{number}", f"e{number}", "axis"], [f"p{number}"]))
        start += size
    return nodes, arrays


def build(path, weight, op, axis, transposed, then=()):
    """y = x Wᵀ from three parts of W; `then`: more nodes, and outputs of theirs."""
    stored = np.ascontiguousarray(weight.T if transposed else weight)
    nodes, arrays = cut(op, axis, stored, transposed)
    if axis == 1:
        sizes = np.array([IN // 4, IN // 4, IN // 2])
        nodes.append(make("Split", ["x", "x_sizes"], ["x0", "x1", "x2"], axis=1))
        arrays["x_sizes"] = sizes
    for number in range(3):
        x = f"x{number}" if axis == 1 else "x"
        if transposed:
            nodes.append(make("MatMul", [x, f"p{number}"], [f"y{number}"]))
        else:
            nodes.append(make("Gemm", [x, f"p{number}"], [f"y{number}"], transB=1))
    last = make("Sum", ["y0", "y1", "y2"], ["y"]) if axis == 1 else make("Concat", ["y0", "y1", "y2"], ["y"], axis=1)
    outputs = [info("y", kinds.FLOAT, None), *(info(one.output[0], kinds.FLOAT, None) for one in then)]
    inits = [onnx.numpy_helper.from_array(value, name) for name, value in {"w": stored, **arrays}.items()]
    graph = onnx.helper.make_graph([*nodes, last, *then], "g", [info("x", kinds.FLOAT, (BATCH, IN))], outputs, inits)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)


def given():
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape).astype(np.float32) for shape in ((OUT, IN), (BATCH, IN)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["Split", "Slice"])
def test_all_parts_get_the_vector(op, axis, transposed, tmp_path):
    weight, x = given()
    file, vector = adapter(tmp_path, weight)
    build(tmp_path / "m.onnx", weight, op, axis, transposed)
    fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
    exact = x.astype(np.float64) @ (weight.astype(np.float64) + vector[:, None]).T
    np.testing.assert_allclose(OnnxRunner(tmp_path / "out.onnx").run({"x": x})[0], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["Split", "Slice"])
@pytest.mark.parametrize("beside", ["part", "whole", "both"])
def test_a_part_that_something_else_needs_too_is_refused(op, beside, tmp_path):
    weight, _ = given()
    file, _ = adapter(tmp_path, weight)
    then = {
        "part": [make("Relu", ["p1"], ["z"])],
        "whole": [make("Relu", ["w"], ["z"])],
        "both": [make("Gemm", ["x", "w"], ["u"], transB=1), make("Relu", ["p0"], ["z"])],
    }[beside]
    build(tmp_path / "m.onnx", weight, op, 0, False, then)
    with pytest.raises(ExportError, match=r"lin: its weight (is )?'w'"):
        fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")


@pytest.mark.parametrize("op", ["Split", "Slice"])
def test_a_weight_that_is_used_whole_and_in_parts(op, tmp_path):
    weight, x = given()
    file, vector = adapter(tmp_path, weight)
    build(tmp_path / "m.onnx", weight, op, 0, False, [make("Gemm", ["x", "w"], ["z"], transB=1)])
    fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
    exact = x.astype(np.float64) @ (weight.astype(np.float64) + vector[:, None]).T
    for found in OnnxRunner(tmp_path / "out.onnx").run({"x": x}):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the old exporter
@pytest.mark.parametrize("exporter", ["dynamo", "script", "script that computes constants"])
def test_cross_attention(exporter, tmp_path):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x, memory):
            return self.attention(x, memory, memory, need_weights=False)[0]

    torch.manual_seed(0)
    model, inputs = Cross().eval(), (torch.randn(2, 5, 16), torch.randn(2, 7, 16))
    options = {"dynamo": exporter == "dynamo", "input_names": ["x", "memory"]}
    options |= {} if options["dynamo"] else {"do_constant_folding": "computes" in exporter}
    torch.onnx.export(model, inputs, tmp_path / "m.onnx", **options)
    fill_vectors(onelora.adapt(model), 0.3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    files = [tmp_path / name for name in ("m.onnx", "a.safetensors", "out.onnx")]
    fold_onnx(*files)
    found = OnnxRunner(tmp_path / "out.onnx").run({"x": inputs[0].numpy(), "memory": inputs[1].numpy()})[0]
    np.testing.assert_allclose(found, merged_copy(model)(*inputs).detach().numpy(), rtol=1e-5, atol=1e-5)
