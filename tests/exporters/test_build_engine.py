"""build_engine with NVIDIA's real parser and builder, on a machine without a GPU."""

import engines
import numpy as np
import onnx
import pytest
import torch
import zoo
from engines import OPTIONS, linear_model
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import build_engine, export_onnx, fold_onnx
from onelora_compile.exporters.jetson.device.core.build import Build
from onelora_compile.exporters.tensorrt.library import find_api
from onelora_compile.exporters.tensorrt.manifest import Manifest
from onelora_compile.exporters.tensorrt.plan_text import holds, kernels
from onelora_compile.exporters.tensorrt.vectors import prepared
from onelora_compile.testing import fill_vectors

pytest.importorskip("tensorrt_rtx_bindings")

MODES = ("fold", "load", "input", "bank")
DEFAULT = [("hf_vit", "fold"), ("bert", "load"), ("gpt2", "bank"), ("dit", "input")]
CASES = [
    pytest.param(
        name, mode, dtype, marks=() if dtype == torch.float16 and (name, mode) in DEFAULT else pytest.mark.slow
    )
    for name in engines.MODELS
    for mode in MODES
    for dtype in (torch.float32, torch.float16)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.mark.parametrize(("name", "mode", "dtype"), CASES)
def test_every_mode_of_every_model(name, mode, dtype, tmp_path):
    path, model = engines.exported(name, mode, dtype, tmp_path)
    report = build_engine(path, tmp_path / "m.engine", shapes=engines.shapes_for(path), **OPTIONS)
    manifest = report.manifest
    assert manifest.mode == {"load": "fold"}.get(mode, mode)
    assert "float16" in manifest.precision if dtype == torch.float16 else "float16" not in manifest.precision
    assert ("all weights are float32" in " ".join(report.notes)) == (dtype == torch.float32)
    inputs = {one.name for one in manifest.inputs}
    if mode == "input":
        assert set(manifest.vectors) <= inputs
        assert set(manifest.vectors) <= set(onelora.vectors(model))
    else:
        assert not set(manifest.vectors) & inputs
    assert ("adapter_ids" in inputs) == (mode == "bank")
    plan = (tmp_path / "m.engine").read_bytes()
    share = 0.7 if name in ("gpt2", "dit") else 1.0
    check_bytes(model, manifest, plan, dtype, torch.float32 if mode == "fold" else dtype, share)
    assert kernels(plan)


def check_bytes(model, manifest, plan, dtype, base_dtype, share):
    """Which constants a plan holds: folded weights and no vectors, or neither of the two; softly, by bytes.

    A model of mode "load" holds W in its dtype already; its sum is rounded to that again.
    """
    folded, vectors = 0, 0
    for name in manifest.vectors:
        module, vector = model.get_submodule(name), onelora.vectors(model)[name]
        weight = module.weight.detach()
        if getattr(module, "nf", None) is not None:  # Conv1D is [in, out]
            merged = weight.to(base_dtype).float() + vector.float()
        else:
            merged = weight.to(base_dtype).float() + vector.float()[:, None]
        folded += holds(plan, engines.numbers(merged, dtype))
        vectors += holds(plan, engines.numbers(vector, torch.float32)) or holds(plan, engines.numbers(vector, dtype))
    if manifest.mode == "fold":
        # GPT-2's c_attn is cut into q, k and v and scaled, DiT's shifts are merged into weights: those are others then.
        assert folded >= len(manifest.vectors) * share
        assert vectors == 0
    else:
        assert folded == 0
    if manifest.mode == "input":
        assert vectors == 0


def test_vectors_of_a_model_with_defaults_would_be_constants(tmp_path):
    """What build_engine is there to prevent: TensorRT itself takes inputs with a default for constants."""
    path, _ = engines.linear(tmp_path, "input")
    api = find_api("rtx")
    build = Build(api.trt, api.logger, strong=True)
    build.parse(str(path))
    network = build.network
    assert [network.get_input(i).name for i in range(network.num_inputs)] == ["input"]
    report = build_engine(path, tmp_path / "m.engine", shapes={"batch": (1, 4, 8)}, **OPTIONS)
    assert [one.name for one in report.manifest.inputs] == ["input", "0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_linear(dtype, tmp_path):
    """The kernels and the constants of each mode."""
    counts, plans = {}, {}
    for mode in MODES:
        path, model = engines.linear(tmp_path, mode, dtype)
        build_engine(path, tmp_path / f"{mode}.engine", shapes={"batch": (1, 4, 8)}, **OPTIONS)
        plans[mode] = (tmp_path / f"{mode}.engine").read_bytes()
        counts[mode] = len(kernels(plans[mode]))
    weight, vector = model[0].weight, onelora.vectors(model)["0"]
    merged = (weight.double() + vector.double()[:, None]).to(torch.float32)
    loaded = weight.to(dtype).float() + vector[:, None]
    for mode, expected in (("fold", merged), ("load", loaded)):
        assert holds(plans[mode], engines.numbers(expected, dtype)), mode
        assert not holds(plans[mode], engines.numbers(vector, torch.float32)), mode
    for mode in ("input", "bank"):
        assert holds(plans[mode], engines.numbers(weight, dtype)), mode
        assert not holds(plans[mode], engines.numbers(merged, dtype)), mode
    assert not holds(plans["input"], engines.numbers(vector, torch.float32))
    assert holds(plans["bank"], engines.numbers(vector, torch.float32))
    assert counts["load"] == counts["fold"]
    assert counts["input"] == counts["fold"] + 1
    assert counts["bank"] == counts["fold"] + 1


@pytest.mark.parametrize("name", ["hf_vit", pytest.param("llama", marks=pytest.mark.slow)])
def test_every_vector_of_a_template_can_be_made_refittable(name, tmp_path):
    path, model = engines.exported(name, "input", torch.float16, tmp_path)
    api = find_api("rtx")
    with prepared(path, "refit", None) as template:
        assert template.mode == "refit"
        build = Build(api.trt, api.logger, strong=True)
        build.parse(str(path), template.content())
        assert set(template.vectors) <= set(onelora.vectors(model))
        assert len(template.vectors) == zoo.SITES[name]
        assert build.refittable([*template.vectors, "no.such.vector"]) == ["no.such.vector"]
        assert all(map(build.network.are_weights_marked_refittable, template.vectors))


def test_an_adapter_in_the_place_of_the_models_own(tmp_path):
    """load: other constants; input: other start values; a base: folded first."""
    other = fill_vectors(onelora.adapt(linear_model()), 0.3, seed=5)
    onelora.save_adapter(other, tmp_path / "other.safetensors")
    merged = other[0].weight + onelora.vectors(other)["0"][:, None]
    path, _ = engines.linear(tmp_path, "load", torch.float32)
    options = {"shapes": {"batch": (1, 4, 8)}, "adapter": tmp_path / "other.safetensors", **OPTIONS}
    report = build_engine(path, tmp_path / "load.engine", **options)
    assert holds((tmp_path / "load.engine").read_bytes(), engines.numbers(merged, torch.float32))
    assert report.manifest.adapter == "other"
    assert set(report.losses) == {"0"}

    path, _ = engines.linear(tmp_path, "input", torch.float32)
    report = build_engine(path, tmp_path / "input.engine", **options)
    start = onelora.read_adapter(tmp_path / "input.engine.safetensors")
    assert torch.equal(start.vectors["0"], onelora.vectors(other)["0"])
    assert Manifest.read(tmp_path / "input.engine").initial == "input.engine.safetensors"

    export_onnx(linear_model(), (torch.randn(4, 64),), tmp_path / "base.onnx", dynamic_shapes=({0: "batch"},))
    report = build_engine(tmp_path / "base.onnx", tmp_path / "base.engine", **options)
    assert report.manifest.mode == "fold"
    assert holds((tmp_path / "base.engine").read_bytes(), engines.numbers(merged, torch.float32))
    assert sorted(report.losses) == ["0"]
    assert "lost to rounding" in str(report)
    assert not list(tmp_path.glob("*.tmp"))


def test_external_weights_of_a_changed_model(tmp_path):
    torch.manual_seed(0)
    model = fill_vectors(onelora.adapt(linear_model()), 0.3)
    x = torch.randn(4, 64)
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters="input", external_data=True)
    report = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", **OPTIONS)
    assert [one.name for one in report.manifest.inputs] == ["input", "0"]
    assert holds((tmp_path / "m.engine").read_bytes(), engines.numbers(model[0].weight, torch.float32))
    first = report.manifest.onnx_sha256
    data = tmp_path / "m.onnx.data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    again = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", **OPTIONS)
    assert again.manifest.onnx_sha256 != first


def test_weights_that_are_read(tmp_path):
    """W + v with v as an input stays in the graph; with both constant it is folded."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(48, 64))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    model = fill_vectors(onelora.adapt(Reads()), 0.3)
    (name,) = onelora.vectors(model)
    for mode in ("load", "input"):
        export_onnx(model, (torch.randn(4, 64),), tmp_path / f"{mode}.onnx", adapters=mode, progress=False)
        report = build_engine(tmp_path / f"{mode}.onnx", tmp_path / f"{mode}.engine", **OPTIONS)
        assert (name in {one.name for one in report.manifest.inputs}) == (mode == "input")
    assert len(kernels((tmp_path / "load.engine").read_bytes())) == 1


def test_a_foreign_model_of_old_ir_with_weights_among_its_inputs(tmp_path):
    weight = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "old",
        [helper.make_tensor_value_info("x", 1, [4, 64]), helper.make_tensor_value_info("w", 1, [64, 48])],
        [helper.make_tensor_value_info("y", 1, [4, 48])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=3), tmp_path / "m.onnx")
    report = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", **OPTIONS)
    assert [one.name for one in report.manifest.inputs] == ["x"]
    assert report.manifest.mode == "base"
    assert holds((tmp_path / "m.engine").read_bytes(), weight)


@pytest.mark.parametrize("name", ["linear", pytest.param("hf_vit", marks=pytest.mark.slow)])
def test_fold_onnx_of_a_quantised_base_costs_no_kernel(name, tmp_path):
    """int8 with Q/DQ: the vector beside the matmul goes into kernels that are there anyway."""
    if name == "linear":
        base, inputs = linear_model(), {"input": torch.randn(4, 64)}
    else:
        base, inputs = engines.MODELS[name]()
    options = {"dynamic_shapes": engines.dynamic(inputs), "verify": False, "progress": False}
    export_onnx(base, (), tmp_path / "float.onnx", kwargs=inputs, **options)
    onelora.save_adapter(fill_vectors(onelora.adapt(base), 0.05), tmp_path / "a.safetensors")
    fold_onnx(tmp_path / "float.onnx", tmp_path / "a.safetensors", tmp_path / "folded.onnx")
    quantized(tmp_path / "folded.onnx", tmp_path / "folded-int8.onnx", inputs)  # fold, then quantise
    quantized(tmp_path / "float.onnx", tmp_path / "int8.onnx", inputs)
    inputs_of_base = [{name: value.numpy() for name, value in inputs.items()}]
    report = fold_onnx(  # the other way
        tmp_path / "int8.onnx", tmp_path / "a.safetensors", tmp_path / "branch.onnx", calibration=inputs_of_base
    )
    assert {one.how for one in report.folded.values()} == {"branch"}
    found, options = {}, {"shapes": {"batch": (1, 4, 8)}, **OPTIONS}
    for form in ("int8", "folded-int8", "branch"):
        built = build_engine(tmp_path / f"{form}.onnx", tmp_path / "m.engine", **options)
        found[form] = kernels((tmp_path / "m.engine").read_bytes())
        assert not built.notes
    assert len(found["branch"]) <= len(found["folded-int8"]) == len(found["int8"]), found
    assert any("Sum" in kernel for kernel in found["branch"])
    # The same in one step: an adapter for the quantised base.
    options |= {"adapter": tmp_path / "a.safetensors", "calibration": inputs_of_base}
    built = build_engine(tmp_path / "int8.onnx", tmp_path / "m.engine", **options)
    assert built.manifest.mode == "fold"
    assert kernels((tmp_path / "m.engine").read_bytes()) == found["branch"]


def quantized(source, target, inputs):
    """Calibrated int8, as TensorRT takes it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rows = iter([{name: torch.randn(value.shape).numpy() for name, value in inputs.items()}] * 2)

        def get_next(self):
            return next(self.rows, None)

    quantize_static(
        source,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
