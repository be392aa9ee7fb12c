"""fold_onnx: a weight that the file returns beside what it computes stays the base's, as in an adapted model."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import adapter_of, assert_arrays, session
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import fill_vectors

W = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(4, 9)).astype(np.float32) + 0.3
# How the file comes to the weight that it returns, and what that is.
RETURNED = {
    "itself": ([], "w", W),
    "identity": ([("Identity", "w", "v")], "v", W),
    "transposed": ([("Transpose", "w", "v")], "v", W.T),
    "passed on": ([("Identity", "w", "u"), ("Transpose", "u", "v")], "v", W.T),
}


@pytest.mark.parametrize("way", RETURNED)
def test_a_returned_weight_is_the_bases(way, tmp_path):
    passes, name, expected = RETURNED[way]
    nodes = [helper.make_node(kind, [one], [other]) for kind, one, other in passes]
    nodes.append(helper.make_node("Gemm", ["x", "w"], ["y"], transB=1))
    value = helper.make_tensor_value_info
    outputs = [value("y", TensorProto.FLOAT, [4, 6]), value(name, TensorProto.FLOAT, list(expected.shape))]
    inputs, held = [value("x", TensorProto.FLOAT, [4, 9])], [numpy_helper.from_array(W, "w")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    adapter, (vector,) = adapter_of(tmp_path, W)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "f.onnx")
    y, returned = session(tmp_path / "f.onnx").run(None, {"x": X})
    merged = W.astype(np.float64) + vector[:, None]
    assert_arrays(y, X.astype(np.float64) @ merged.T, X @ merged.astype(np.float32).T)
    np.testing.assert_array_equal(returned, expected)


def test_and_so_an_adapted_model_returns_it():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(9, 6)

        def forward(self, x):
            return self.linear(x), self.linear.weight, self.linear.weight.T

    model, x = Returns(), torch.from_numpy(X)
    base = model(x)[1:]
    fill_vectors(onelora.adapt(model), 0.5)
    assert all(torch.equal(*pair) for pair in zip(model(x)[1:], base, strict=True))
