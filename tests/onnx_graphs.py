"""Small ONNX graphs by hand, and adapters of their weights."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors


def adapter_of(folder, *weights, scale=0.3):
    """An adapter of linears with given weights [out, in], and its vectors as float64 arrays."""
    torch.manual_seed(1)
    linears = [nn.Linear(w.shape[1], w.shape[0]) for w in weights]
    with torch.no_grad():
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.copy_(torch.from_numpy(np.array(weight, np.float32)))
    model = fill_vectors(onelora.adapt(nn.Sequential(*linears), onelora.OneLoRAConfig(target_modules=r"\d+")), scale)
    onelora.save_adapter(model, folder / "own.safetensors")
    return folder / "own.safetensors", [v.detach().double().numpy() for v in onelora.vectors(model).values()]


def assert_arrays(found, exact, plain):
    """`assert_parity` of arrays."""
    assert_parity(torch.from_numpy(found), torch.from_numpy(exact), torch.from_numpy(plain))


def four_bits(rng, n=8, k=64, block=16):
    """A MatMulNBits with floating zero points, its arrays, and numbers, scales and zero points by blocks."""
    q = rng.integers(0, 16, (n, k // block, block), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.1, (n, k // block)).astype(np.float32)
    zero = rng.uniform(6, 9, (n, k // block)).astype(np.float32)
    sizes: Any = {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": 1}
    node = onnx.helper.make_node("MatMulNBits", ["x", "q", "s", "z"], ["y"], domain="com.microsoft", **sizes)
    arrays = {"q": q[..., 0::2] | q[..., 1::2] << 4, "s": scale.flatten(), "z": zero.flatten()}
    return node, arrays, q, scale[..., None], zero[..., None]


def save_graph(path, nodes, arrays, x, y, opsets=()):
    """A file of these nodes and arrays, with one input x and one output y, each (name, shape)."""
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(x[0], onnx.TensorProto.FLOAT, x[1])],
        [onnx.helper.make_tensor_value_info(y[0], onnx.TensorProto.FLOAT, y[1])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    imports = [onnx.helper.make_opsetid("", 18), *(onnx.helper.make_opsetid(*one) for one in opsets)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=9), path)
    return path


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(model, path, **inputs):
    """The first output in ONNX Runtime of an onnx_ir model, saved at a path."""
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnxruntime.InferenceSession(str(path)).run(None, inputs)[0]


def operators(model):
    return [node.op_type for node in model.graph.all_nodes()]
