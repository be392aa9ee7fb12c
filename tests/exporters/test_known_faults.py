"""Graphs that releases of TensorRT compute wrong: what is rewritten computes the same, and is said."""

import json
import warnings
from typing import Any

import bundles
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_graphs import operators, run
from torch import nn

from onelora_compile.exporters import bundle, export_onnx
from onelora_compile.exporters.faults.rewrite import rewrite_for
from onelora_compile.exporters.faults.split_scale import split_scales
from onelora_compile.exporters.jetson.device.core.faults import FAULTS, SPLIT_SCALE, known
from onelora_compile.exporters.opsets.lower import lower_opset

WRONG, RIGHT = "10.3.0", "10.13.3"


class Attention(nn.Module):
    """Attention as most models write it today; heads of a width whose root is exact, or not."""

    def __init__(self, width, mask=None):
        super().__init__()
        self.packed, self.out, self.mask = nn.Linear(2 * width, 6 * width), nn.Linear(2 * width, 2 * width), mask
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x):
        batch, tokens, width = x.shape
        packed = self.packed(self.norm(x)).view(batch, tokens, 3, 2, width // 2)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        options: dict[str, Any] = {"is_causal": True} if self.mask == "causal" else {}
        if self.mask == "added":
            options["attn_mask"] = x.new_zeros(tokens, tokens).masked_fill(
                x.new_ones(tokens, tokens).triu(1).bool(), -1e4
            )
        y = nn.functional.scaled_dot_product_attention(q, k, v, **options)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize(
    ("opset", "mask", "dtype", "width"),
    [
        (17, None, torch.float16, 20),
        (18, None, torch.float32, 16),
        (18, None, torch.float16, 16),
        (18, "causal", torch.float32, 20),
        (18, "added", torch.float16, 20),
        (23, None, torch.float32, 20),
        (23, "causal", torch.float16, 16),
        (23, "added", torch.float32, 16),
    ],
)
def test_the_whole_scale_is_on_q_and_the_function_is_the_same(opset, mask, dtype, width, tmp_path):
    torch.manual_seed(0)
    model, x = Attention(width, mask).eval(), torch.randn(3, 7, 2 * width).to(dtype)
    axes = ({0: "batch", 1: "tokens"},)
    half = dtype is torch.float16
    export_onnx(
        model,
        (x.float(),),
        tmp_path / "m.onnx",
        opset_version=opset,
        dynamic_shapes=axes,
        dtype=dtype if half else None,
        verify=False,
    )
    found = ir.load(tmp_path / "m.onnx")
    lower_opset(found, 20)
    exact = model.to(dtype).double()(x.double()).detach().numpy()
    name = str(found.graph.inputs[0].name)
    plain = np.abs(run(found, tmp_path / "a.onnx", **{name: x.numpy()}) - exact).max()
    assert len(split_scales(found)) == 1
    done = rewrite_for(found, WRONG, half)
    assert [note for note in done.notes if "the whole scale of 1 attentions was put on q" in note and "4333" in note]
    assert SPLIT_SCALE not in done.graphs
    assert not split_scales(found)
    rewritten = np.abs(run(found, tmp_path / "b.onnx", **{name: x.numpy()}) - exact).max()
    assert rewritten <= 2 * plain + np.finfo(np.float16 if half else np.float32).eps


def scores(dtype, q, k, width, softmax=True, nodes=(), root=None):
    """Softmax(q a (k b)ᵀ) by hand, what is done to the key on the way between."""
    root = np.array(width**-0.25 if root is None else root, dtype)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            made("Mul", ["q", "root"], ["qs"]),
            made("Mul", ["root", "k"], ["ks"]),
            *(nodes or [made("Transpose", ["ks"], ["kt"], perm=[0, 2, 1])]),
            made("MatMul", ["qs", "kt"], ["s"]),
            made("Softmax" if softmax else "Relu", ["s"], ["y"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in (("q", q), ("k", k))],
        [onnx.helper.make_tensor_value_info("y", kind, ["batch", "queries", "keys"])],
        [onnx.numpy_helper.from_array(root, "root")],
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9))


def test_the_scale_is_the_one_that_was_meant(tmp_path):
    q, k = (np.random.default_rng(i).normal(size=(2, 5, 64)).astype(np.float16) for i in (0, 1))
    model = scores(np.float16, q.shape, k.shape, 64)
    assert rewrite_for(model, WRONG, True).changed
    constants = [node.attributes["value"].as_tensor().numpy() for node in model.graph if node.op_type == "Constant"]
    assert [float(one) for one in constants] == [0.125]  # the rounded roots would make 0.12498
    wide = q.astype(np.float64) @ k.astype(np.float64).swapaxes(1, 2) / 8
    exact = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    assert np.abs(run(model, tmp_path / "m.onnx", q=q, k=k) - exact).max() < 2e-3


def test_a_scale_of_another_kind_is_the_product_of_its_parts(tmp_path):
    model = scores(np.float32, (1, 3, 8), (1, 3, 8), 8, root=0.3)
    q, k = (np.random.default_rng(i).normal(size=(1, 3, 8)).astype(np.float32) for i in (0, 1))
    plain = run(model, tmp_path / "a.onnx", q=q, k=k)
    rewrite_for(model, WRONG, False)
    (constant,) = [node.attributes["value"].as_tensor().numpy() for node in model.graph if node.op_type == "Constant"]
    assert float(constant) == np.float32(np.float64(np.float32(0.3)) ** 2)
    np.testing.assert_allclose(run(model, tmp_path / "b.onnx", q=q, k=k), plain, rtol=1e-6)


@pytest.mark.parametrize("case", ["no softmax", "quantised key", "a scale for each channel"])
def test_other_products_are_left_alone(case):
    made = onnx.helper.make_node
    options: dict[str, Any] = {}
    if case == "quantised key":
        options["nodes"] = [
            made("QuantizeLinear", ["ks", "root"], ["kq"]),
            made("DequantizeLinear", ["kq", "root"], ["kd"]),
            made("Transpose", ["kd"], ["kt"], perm=[0, 2, 1]),
        ]
    if case == "a scale for each channel":
        options["root"] = np.full(8, 0.3)
    model = scores(np.float32, (1, 3, 8), (1, 3, 8), 8, softmax=case != "no softmax", **options)
    before = operators(model)
    done = rewrite_for(model, WRONG, False)
    assert (operators(model), done.notes) == (before, [])


def test_what_else_reads_the_scaled_key_keeps_it(tmp_path):
    model = scores(np.float32, (1, 3, 8), (1, 3, 8), 8)
    scaled = next(node for node in model.graph if node.op_type == "Transpose").outputs[0]
    scaled.dtype, scaled.shape = ir.DataType.FLOAT, ir.Shape([1, 8, 3])
    model.graph.outputs.append(scaled)
    rewrite_for(model, WRONG, False)
    q, k = (np.random.default_rng(i).normal(size=(1, 3, 8)).astype(np.float32) for i in (0, 1))
    ir.save(model, tmp_path / "m.onnx")
    _, key = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"q": q, "k": k})
    np.testing.assert_allclose(key, k.swapaxes(1, 2) * np.float32(8**-0.25), rtol=1e-6)


def test_the_scale_that_torchscript_computes_in_the_graph(tmp_path):
    torch.manual_seed(0)
    model, x = Attention(20).eval(), torch.randn(3, 7, 40)
    axes = {"x": {0: "batch", 1: "tokens"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), tmp_path / "m.onnx", dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes
        )
    found = ir.load(tmp_path / "m.onnx")
    exact = model.double()(x.double()).detach().numpy()
    plain = np.abs(run(found, tmp_path / "a.onnx", x=x.numpy()) - exact).max()
    assert rewrite_for(found, WRONG, False).changed
    assert not split_scales(found)
    assert np.abs(run(found, tmp_path / "b.onnx", x=x.numpy()) - exact).max() <= 2 * plain + 1e-7


@pytest.mark.parametrize(
    ("version", "graphs"),
    [
        ("8.5.2", {"half_norm", "layer_norm"}),
        ("8.6.2", {"half_norm"}),
        ("10.2.0.19", {"half_norm"}),
        ("10.3.0", {"half_norm", "split_scale"}),
        ("10.7.0.23", {"half_norm", "split_scale"}),
        ("10.8", {"half_norm"}),
        ("11.4.0", {"half_norm"}),
    ],
)
def test_which_release_has_which_fault(version, graphs):
    assert {fault.graph for fault in known(version, "8.7")} == graphs
    assert {fault.graph for fault in known(version, "8.7", half=False)} == graphs - {"half_norm"}
    assert known(version, "8.7", graphs=["none of them"]) == []


def test_a_gpu_has_its_own():
    assert "half_attention" in {fault.graph for fault in known("10.16.1", "12.0")}
    assert all(fault.issues and fault.effect for fault in FAULTS)


@pytest.mark.parametrize(("jetpack", "rewritten"), [("6.2", True), ("6.0", False), ("7.2", False)])
def test_a_bundle_has_the_graph_that_its_release_computes_right(jetpack, rewritten, tmp_path):
    report = bundle(bundles.sources() / "fold.onnx", tmp_path / "b", jetpack=jetpack, shapes=bundles.SHAPES)
    assert bool(split_scales(ir.load(tmp_path / "b" / "model.onnx"))) != rewritten
    assert ("was put on q" in "".join(report.notes)) == rewritten
    assert ("was put on q" in str(report)) == rewritten
    graphs = json.loads((tmp_path / "b" / "manifest.json").read_text())["model"]["graphs"]
    assert ("split_scale" in graphs) != rewritten
