"""Trained heads in files that write them in other ways: a weight on the left, factors of a Gemm, half precision."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError, MergeError
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

make = helper.make_node
GEMM = [make("Gemm", ["x", "a.weight", "a.bias"], ["u"], transB=1), make("Tanh", ["u"], ["t"])]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.h = nn.Linear(8, 8), nn.Linear(8, 4)
        nn.init.zeros_(self.h.bias)

    def forward(self, x):
        return self.h(torch.tanh(self.a(x)))


def trained(folder, extra=0.0):
    """The base's arrays by name, and its adapted model, whose head is another one, with its file."""
    torch.manual_seed(0)
    base = Head().eval()
    model = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(modules_to_save=["h"]))
    fill_vectors(model, 0.3)
    with torch.no_grad():
        for parameter in (model.h.weight, model.h.bias):
            parameter.add_(torch.randn_like(parameter))
        model.h.bias.add_(extra)
    onelora.save_adapter(model, folder / "a.safetensors")
    return {name: value.numpy() for name, value in base.state_dict().items() if name != "h.bias"}, model


def folded(folder, nodes, arrays, rank=2, kind=TensorProto.FLOAT):
    """Write the file, and fold into it."""
    x, y = (helper.make_tensor_value_info(name, kind, [None] * rank) for name in "xy")
    inits = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in arrays.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], inits)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "m.onnx")
    return fold_onnx(folder / "m.onnx", folder / "a.safetensors", folder / "out.onnx", progress=False)


def check(folder, model, x):
    found = onnxruntime.InferenceSession(folder / "out.onnx").run(None, {"x": x.numpy()})[0]
    plain, exact = merged_copy(model)(x), merged_copy(model, torch.float64)(x.double())
    assert_parity(torch.from_numpy(found), exact, plain)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_dropped_bias_of_a_weight_on_the_left_is_added_along_its_rows(batch, tmp_path):
    arrays, model = trained(tmp_path)
    left = [
        make("Transpose", ["t"], ["tt"]),
        make("MatMul", ["h.weight", "tt"], ["z"]),
        make("Transpose", ["z"], ["y"]),
    ]
    folded(tmp_path, [*GEMM, *left], arrays)
    check(tmp_path, model, torch.randn(batch, 8))


@pytest.mark.parametrize("rank", [3, 4])
def test_a_dropped_bias_of_channels_first(rank, tmp_path):
    arrays, model = trained(tmp_path)
    arrays["a.weight"] = arrays["a.weight"].T
    turn = [*range(rank - 2), rank - 1, rank - 2]
    nodes = [
        *(make("MatMul", ["x", "a.weight"], ["u0"]), make("Add", ["u0", "a.bias"], ["u"]), make("Tanh", ["u"], ["t"])),
        *(make("Transpose", ["t"], ["tt"], perm=turn), make("MatMul", ["h.weight", "tt"], ["z"])),
        make("Transpose", ["z"], ["y"], perm=turn),
    ]
    folded(tmp_path, nodes, arrays, rank)
    check(tmp_path, model, torch.randn(4, 4, 4, 8)[(0,) * (4 - rank)])


def test_a_dropped_bias_on_the_right(tmp_path):
    arrays, model = trained(tmp_path)
    arrays["h.weight"] = arrays["h.weight"].T
    folded(tmp_path, [*GEMM, make("MatMul", ["t", "h.weight"], ["y"])], arrays)
    check(tmp_path, model, torch.randn(3, 8))


def test_an_axis_that_nothing_tells_is_refused(tmp_path):
    """An op of another domain gives no rank: W x is [4] or [4, n]."""
    arrays, _ = trained(tmp_path)
    nodes = [*GEMM, make("Strange", ["t"], ["tt"], domain="own"), make("MatMul", ["h.weight", "tt"], ["y"])]
    with pytest.raises(ExportError, match=r"h\.bias: MatMul .* unknown rank"):
        folded(tmp_path, nodes, arrays)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (0.5, 1.0), (1.0, 0.0)])
def test_a_bias_of_zeros_in_a_scaled_gemm_is_refused(alpha, beta, tmp_path):
    arrays, _ = trained(tmp_path)
    arrays |= {"hb": np.zeros(4, np.float32)}
    head = make("Gemm", ["t", "h.weight", "hb"], ["y"], transB=1, alpha=alpha, beta=beta)
    with pytest.raises(ExportError, match=rf"h\.bias: .*alpha={alpha}.*beta={beta}"):
        folded(tmp_path, [*GEMM, head], arrays)
    assert not (tmp_path / "out.onnx").exists()


def test_a_dropped_bias_of_a_scaled_gemm_is_refused(tmp_path):
    arrays, _ = trained(tmp_path)
    with pytest.raises(ExportError, match=r"h\.bias: .*alpha=0.5"):
        folded(tmp_path, [*GEMM, make("Gemm", ["t", "h.weight"], ["y"], transB=1, alpha=0.5)], arrays)


def test_the_factor_of_all_a_gemm_gives_stays(tmp_path):
    arrays, model = trained(tmp_path)
    arrays |= {"hb": np.zeros(4, np.float32), "two": np.float32(2)}
    head = [
        make("Gemm", ["t", "h.weight", "hb"], ["z"], transB=1, alpha=0.5, beta=0.5),
        make("Mul", ["z", "two"], ["y"]),
    ]
    folded(tmp_path, [*GEMM, *head], arrays)
    check(tmp_path, model, torch.randn(3, 8))


@pytest.mark.parametrize("dropped", [True, False])
def test_a_trained_value_that_float16_cannot_hold_is_refused(dropped, tmp_path):
    arrays, _ = trained(tmp_path, extra=1e5)
    arrays |= {} if dropped else {"h.bias": np.zeros(4, np.float32)}
    half = {name: value.astype(np.float16) for name, value in arrays.items()}
    head = make("Gemm", ["t", "h.weight", *([] if dropped else ["h.bias"])], ["y"], transB=1)
    with pytest.raises(MergeError, match=r"'h\.bias': a trained value of size 1e\+05 does not fit float16"):
        folded(tmp_path, [*GEMM, head], half, kind=TensorProto.FLOAT16)
    assert not (tmp_path / "out.onnx").exists()
