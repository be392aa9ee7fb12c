"""export_onnx(keep_float32=): float16 where it holds, on models where all of it would be NaN."""

import functools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import half_models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from half_evaluator import evaluate
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ConfigError, ExportError, MergeError
from onelora_compile.exporters import export_onnx, fold_onnx, ranges
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.exporters.opsets.lower import lower_opset
from onelora_compile.testing import fill_vectors

MODES = ("fold", "input", "load", "bank")
BOUND = 5e-3  # of the largest magnitude of an output: a few roundings of float16 for each block


def inputs_of(model, x, **more):
    name = model.graph.input[0].name
    return {name: x.half().numpy() if x.is_floating_point() else x.numpy(), **more}


@functools.cache
def adapted(name):
    """A model with an adapter, its input, the files of two adapters, and what it computes in float64 with the first."""
    folder = Path(tempfile.mkdtemp())
    model, x = half_models.made(name)
    onelora.adapt(model)
    onelora.save_adapter(fill_vectors(model, 0.02, seed=3), folder / "b.safetensors")
    onelora.save_adapter(fill_vectors(model, 0.02), folder / "a.safetensors")
    return model, x, [folder / "a.safetensors", folder / "b.safetensors"], exact(model, x)


def exact(model, x):
    """In float64, of the input as float16 has it, by weights that were merged there."""
    copy = half_models.copied(model).double()
    onelora.merge(copy)
    with torch.no_grad():
        return [value.numpy() for value in copy(x.half().double() if x.is_floating_point() else x)]


def error(found, expected):
    return max(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True))


# Swin puts its windows into the batch, so no bank can choose rows in it.
CASES = [(name, mode) for name in half_models.MODELS for mode in MODES if (name, mode) != ("swin", "bank")]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_each_output_is_within_the_bound_in_every_mode(name, mode, tmp_path):
    model, x, files, expected = adapted(name)
    bank = files if mode == "bank" else ()
    report = export_onnx(
        model,
        (x,),
        tmp_path / "m.onnx",
        adapters=mode,
        dtype=torch.float16,
        keep_float32="auto",
        bank=bank,
        progress=False,
    )
    found = onnx.load(tmp_path / "m.onnx")
    more = {"adapter_ids": np.zeros(2, np.int64)} if mode == "bank" else {}
    outputs = evaluate(found, **inputs_of(found, x, **more))
    assert error(outputs, expected) < BOUND
    assert report.error is not None
    assert report.error < BOUND  # in ONNX Runtime, against eager in float32, with other vectors too
    # Most of the bytes are float16, and each vector is float32.
    sizes = Counter[int]()
    for tensor in found.graph.initializer:
        sizes[tensor.data_type] += onnx.numpy_helper.to_array(tensor).nbytes
    own = Metadata.from_props({one.key: one.value for one in found.metadata_props}, "m").vectors
    held = {tensor.name: tensor.data_type for tensor in found.graph.initializer}
    if mode != "fold":
        assert {held[vector] for vector in own} == {onnx.TensorProto.FLOAT}
        assert len(own) == len(onelora.vectors(model))
    vectors = sum(
        onnx.numpy_helper.to_array(one).nbytes for one in found.graph.initializer if one.name.rstrip("_") in own
    )
    assert sizes[onnx.TensorProto.FLOAT] - vectors * (mode != "fold") < 0.25 * sizes[onnx.TensorProto.FLOAT16]
    assert report.mixed is not None
    assert report.mixed.casts == sum(node.op_type == "Cast" for node in found.graph.node) - cast_before(mode, found)


def cast_before(mode, model):
    """Casts that are no border: of integers, of constants."""
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input}
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    borders = 0
    for node in model.graph.node:
        if node.op_type == "Cast" and (node.input[0] in held - inputs or kinds.get(node.input[0], 1) not in floats):
            borders += 1
    return borders


@pytest.mark.parametrize("name", half_models.MODELS)
def test_without_it_everything_is_nan_and_the_error_says_what_helps(name, tmp_path):
    model, x, _, _ = adapted(name)
    with pytest.raises((ExportError, MergeError), match=r"keep_float32='auto'\)? leaves"):
        export_onnx(model, (x,), tmp_path / "m.onnx", dtype=torch.float16, progress=False)
    base = half_models.copied(model)
    onelora.detach(base)
    export_onnx(base, (x,), tmp_path / "m.onnx", dtype=torch.float16, verify=False, progress=False)
    found = onnx.load(tmp_path / "m.onnx")
    assert all(np.isnan(value).any() for value in evaluate(found, **inputs_of(found, x)))
    report = ranges(tmp_path / "m.onnx", [inputs_of(found, x)])
    assert not report.passed
    export_onnx(base, (x,), tmp_path / "wide.onnx", verify=False, progress=False)
    wide = {name: x.numpy() for name in inputs_of(found, x)}
    assert report.broken
    assert ranges(tmp_path / "wide.onnx", [wide]).worst()[0].largest > 65504


def test_a_model_without_trouble_keeps_sums_alone(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4), nn.Softmax(-1)).eval()
    onelora.adapt(model)
    fill_vectors(model, 0.1)
    x = torch.randn(3, 16)
    report = export_onnx(model, (x,), tmp_path / "m.onnx", dtype=torch.float16, keep_float32="auto", progress=False)
    assert report.mixed is not None
    assert set(report.mixed.operators.values()) == {"Softmax sums"}
    assert report.mixed.casts == 2
    assert "1 of " in str(report)
    (value,) = onnx.load(tmp_path / "m.onnx").graph.output
    assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_names_stay_and_unknown_ones_are_an_error(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(3, 16)
    options: dict[str, Any] = {"dtype": torch.float16, "progress": False}
    report = export_onnx(model, (x,), tmp_path / "m.onnx", keep_float32=["re*"], **options)
    assert report.mixed is not None
    assert report.mixed.operators == {"relu": "named by keep_float32"}
    assert report.mixed.casts == 2
    with pytest.raises(ConfigError, match="'lniear' is no operator of the model and no value; it has "):
        export_onnx(model, (x,), tmp_path / "m.onnx", keep_float32=["lniear"], **options)
    with pytest.raises(ConfigError, match=r"is for dtype=torch.float16; dtype is None"):
        export_onnx(model, (x,), tmp_path / "m.onnx", keep_float32="auto")
    with pytest.raises(ConfigError, match="calibration is for keep_float32='auto'"):
        export_onnx(model, (x,), tmp_path / "m.onnx", calibration=[{}], **options)


class Grows(nn.Module):
    """Large on large inputs alone."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.first(x)
        return self.last(nn.functional.layer_norm(y * y, (8,)))


def test_calibration_sees_what_the_example_does_not(tmp_path):
    torch.manual_seed(0)
    model, x = Grows().eval(), torch.randn(4, 8)
    options: dict[str, Any] = {"dtype": torch.float16, "keep_float32": "auto", "input_names": ["x"], "progress": False}
    large = x * 900
    wide = [half_models.copied(model).double()(large.half().double()).detach().numpy()]
    export_onnx(model, (x,), tmp_path / "a.onnx", **options)
    assert not error(evaluate(tmp_path / "a.onnx", x=large.half().numpy()), wide) < 0.1
    export_onnx(model, (x,), tmp_path / "b.onnx", calibration=[{"x": large.numpy()}, {"x": x.numpy()}], **options)
    assert error(evaluate(tmp_path / "b.onnx", x=large.half().numpy()), wide) < BOUND


def test_an_output_beyond_float16_stays_in_float32(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(8, 3).eval(), torch.randn(4, 8)
    with torch.no_grad():
        model.weight.mul_(1e6)
    export_onnx(model, (x,), tmp_path / "m.onnx", dtype=torch.float16, keep_float32="auto", progress=False)
    (value,) = onnx.load(tmp_path / "m.onnx").graph.output
    assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_body_stays_as_it_is_and_integers_are_integers(tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, ids):
            y = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (self.linear(x),))
            return y, ids + 1

    model, x = Branches().eval(), torch.randn(4, 8)
    ids = torch.arange(3)
    report = export_onnx(model, (x, ids), tmp_path / "m.onnx", dtype=torch.float16, keep_float32="auto", progress=False)
    assert report.mixed is not None
    assert "it has a body" in report.mixed.operators.values()
    values = [one.type.tensor_type.elem_type for one in onnx.load(tmp_path / "m.onnx").graph.output]
    assert values == [onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64]


def test_trained_heads_are_swapped_and_cast_where_they_are_read(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4)).eval()
    onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["0"], modules_to_save=["2"], train_norms=True))
    fill_vectors(model, 0.1)
    for mode in ("input", "load"):
        report = export_onnx(
            model,
            (torch.randn(3, 16),),
            tmp_path / f"{mode}.onnx",
            adapters=mode,
            dtype=torch.float16,
            keep_float32="auto",
            progress=False,
        )
        assert report.error is not None
        assert report.error < BOUND  # also with other values of all of them
        found = onnx.load(tmp_path / f"{mode}.onnx")
        kinds = {one.name: one.data_type for one in found.graph.initializer}
        assert {kinds[name] for name in ("0", "2.weight", "2.bias", "1.weight")} == {onnx.TensorProto.FLOAT}


def test_a_file_of_the_base_is_folded_in_its_own_dtypes(tmp_path):
    """fold_onnx finds the weights of a mixed file, which keep their names."""
    model, x, (file, _), expected = adapted("siglip")
    base = half_models.copied(model)
    onelora.detach(base)
    export_onnx(base, (x,), tmp_path / "m.onnx", dtype=torch.float16, keep_float32="auto", progress=False)
    fold_onnx(tmp_path / "m.onnx", file, tmp_path / "f.onnx", progress=False)
    found = onnx.load(tmp_path / "f.onnx")
    assert error(evaluate(found, **inputs_of(found, x)), expected) < BOUND


def test_the_softmax_inside_of_an_operator_is_float32(tmp_path):
    class Attends(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    q = torch.randn(2, 3, 5, 16)
    export_onnx(
        Attends().eval(),
        (q,),
        tmp_path / "m.onnx",
        dtype=torch.float16,
        keep_float32="auto",
        opset_version=23,
        progress=False,
    )
    (attention,) = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "Attention"]
    assert {one.name: one.i for one in attention.attribute}["softmax_precision"] == onnx.TensorProto.FLOAT
    found = ir.load(tmp_path / "m.onnx")
    lower_opset(found, 20)
    (softmax,) = [node for node in found.graph if node.op_type == "Softmax"]
    assert softmax.outputs[0].dtype == ir.DataType.FLOAT
