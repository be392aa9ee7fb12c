"""fold_onnx: in which order a file holds a square weight, where the numbers are the same either way."""

import copy
from typing import Any

import numpy as np
import onnx
import onnx_tools as tools
import pytest
import torch
from onnx_graphs import adapter_of, assert_arrays, save_graph, session
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

N = 8
RANDOM = np.random.default_rng(3).normal(size=(N, N)).astype(np.float32)
HALF = np.array([[1, 1], [1, -1]])
ROTATION = (np.kron(HALF, np.kron(HALF, HALF)) / N**0.5).astype(np.float32)  # Hadamard's
# What is its own transpose, and what is not.
WEIGHTS = {
    "zeros": np.zeros((N, N), np.float32),
    "identity": np.eye(N, dtype=np.float32),
    "one number": np.full((N, N), 0.1, np.float32),
    "rotation": ROTATION,
    "symmetric": RANDOM + RANDOM.T,
    "random": RANDOM,
}


def made(op, *inputs, domain="", **attributes):
    return onnx.helper.make_node(op, inputs, ["y"], domain=domain, **attributes)


def turned(value="w"):
    return onnx.helper.make_node("Transpose", [value], ["t"], perm=[1, 0])


# The nodes, the weight [out, in] as the file holds it, whether it stands on the left of x.
FORMS: dict[str, Any] = {
    "MatMul": ([made("MatMul", "x", "w")], np.transpose, False),
    "Gemm": ([made("Gemm", "x", "w")], np.transpose, False),
    "Gemm, transB": ([made("Gemm", "x", "w", transB=1)], np.array, False),
    "Transpose, MatMul": ([turned(), made("MatMul", "x", "t")], np.array, False),
    "Transpose, Gemm, transB": ([turned(), made("Gemm", "x", "t", transB=1)], np.transpose, False),
    "Cast, MatMul": (
        [onnx.helper.make_node("Cast", ["w"], ["t"], to=1), made("MatMul", "x", "t")],
        lambda w: w.T.astype(np.float64),
        False,
    ),
    "a batch of one": ([made("MatMul", "x", "w")], lambda w: w.T[None], False),
    "a batch of one, turned": (
        [onnx.helper.make_node("Transpose", ["w"], ["t"], perm=[0, 2, 1]), made("MatMul", "x", "t")],
        lambda w: w[None],
        False,
    ),
    "FusedMatMul, transB": ([made("FusedMatMul", "x", "w", domain="com.microsoft", transB=1)], np.array, False),
    "Einsum, oi": ([made("Einsum", "x", "w", equation="bi,oi->bo")], np.array, False),
    "Einsum, io": ([made("Einsum", "x", "w", equation="bi,io->bo")], np.transpose, False),
    "MatMul, left": ([made("MatMul", "w", "x")], np.array, True),
    "Gemm, left": ([made("Gemm", "w", "x")], np.array, True),
    "Gemm, left, transA": ([made("Gemm", "w", "x", transA=1)], np.transpose, True),
    "Conv": (
        [
            onnx.helper.make_node("Unsqueeze", ["x", "last"], ["x3"]),
            onnx.helper.make_node("Conv", ["x3", "w"], ["y3"]),
            onnx.helper.make_node("Squeeze", ["y3", "last"], ["y"]),
        ],
        lambda w: w[..., None],
        False,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_reads_a_weight_tells_its_order(weight, form, tmp_path):
    nodes, stored, left = FORMS[form]
    path, arrays = tmp_path / "m.onnx", {"w": stored(WEIGHTS[weight]), "last": np.array([-1])}
    used = {name for node in nodes for name in node.input}
    save_graph(
        path,
        nodes,
        {name: np.ascontiguousarray(value) for name, value in arrays.items() if name in used},
        ("x", [N, N]),
        ("y", None),
        [("com.microsoft", 1)],
    )
    adapter, (vector,) = adapter_of(tmp_path, WEIGHTS[weight])
    fold_onnx(path, adapter, tmp_path / "out.onnx")
    x = np.random.default_rng(4).normal(size=(N, N)).astype(np.float32) + 0.5
    merged = WEIGHTS[weight] + vector[:, None]
    (y,) = session(tmp_path / "out.onnx").run(None, {"x": x})
    exact, plain = (
        merged.astype(kind) @ x.astype(kind) if left else x.astype(kind) @ merged.astype(kind).T
        for kind in (np.float64, np.float32)
    )
    assert_arrays(y.reshape(N, N), exact, plain)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_ops_that_disagree_are_refused_where_numbers_do_not_tell(weight, tmp_path):
    nodes = [onnx.helper.make_node("Gemm", ["x", "w"], ["h"], transB=1), made("MatMul", "h", "w")]
    save_graph(tmp_path / "m.onnx", nodes, {"w": WEIGHTS[weight]}, ("x", [2, N]), ("y", [2, N]))
    model = nn.Sequential(nn.Linear(N, N))
    model[0].weight.data = torch.from_numpy(WEIGHTS[weight].copy())
    onelora.save_adapter(fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig()), 0.5), tmp_path / "a.safetensors")
    file = tools.used(tmp_path / "a.safetensors", 1, 2)
    if weight == "random":  # its numbers tell, and then both uses can only be this layer's
        fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
        x = np.random.default_rng(4).normal(size=(2, N)).astype(np.float32)
        merged = merged_copy(model).get_parameter("0.weight").detach()  # W.T is what the second reads
        (y,) = session(tmp_path / "out.onnx").run(None, {"x": x})
        exact, plain = (
            torch.from_numpy(x).to(kind) @ one.T @ one
            for kind in (torch.float64, torch.float32)
            for one in [merged.to(kind)]
        )
        assert_parity(torch.from_numpy(y), exact, plain)
        return
    with pytest.raises(ExportError, match=r"0: its numbers are .* 'w' \(rows from 0, columns from 0\)"):
        fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.body, self.head = nn.Linear(6, N), nn.Linear(N, N)
        self.head.weight.data = torch.from_numpy(weight.copy())

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("tool", ["dynamo", "dynamo_plain", "torchscript", "torchscript_plain", "slim", "ort_basic"])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_trained_square_head(weight, axes, tool, tmp_path):
    torch.manual_seed(0)
    base, x = Head(WEIGHTS[weight]), torch.randn(*(2, 3, 6)[-axes:])
    path = tools.PLAIN[tool](base, (x,), tmp_path / "m.onnx")
    model = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(modules_to_save=["head"]))
    fill_vectors(model, 0.3)
    with torch.no_grad():
        model.head.weight.add_(torch.randn(N, N))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx")
    wide = copy.deepcopy(base).double()
    wide.body.weight.data += onelora.vectors(model)["body"].detach().double()[:, None]
    wide.head.weight.data = model.head.weight.detach().double()
    found = torch.from_numpy(tools.run(tmp_path / "out.onnx", (x,))).float()
    assert_parity(found, wide(x.double()), copy.deepcopy(wide).float()(x))
