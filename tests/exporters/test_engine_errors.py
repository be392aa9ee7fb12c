"""Every way in which an engine can't be built says why and what to do; nothing is left behind."""

import os

import engines
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from engines import OPTIONS, RTX
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import build_engine, export_onnx
from onelora_compile.exporters.jetson.device.core.build import Build
from onelora_compile.exporters.jetson.device.core.progress import Line
from onelora_compile.exporters.tensorrt import library
from onelora_compile.exporters.tensorrt.messages import in_our_words
from onelora_compile.testing import fill_vectors

pytest.importorskip("tensorrt_rtx_bindings")

BATCH = {"shapes": {"batch": (1, 4, 8)}}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return engines.linear(tmp_path_factory.mktemp("half"))[0]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return engines.linear(tmp_path_factory.mktemp("single"), dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def swappable(tmp_path_factory):
    return engines.linear(tmp_path_factory.mktemp("swappable"), "input")[0]


def refused(error, match, onnx_path, tmp_path, **options):
    with pytest.raises(error, match=match):
        build_engine(onnx_path, tmp_path / "m.engine", **OPTIONS | options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (
            None,
            r"missing for input \[batch, 64\]. For example shapes=\{'input': \(\(1, 64\), \(8, 64\), \(32, 64\)\)\}",
        ),
        ({"images": (1, 64)}, r"shapes names images; the model's inputs are input; its dynamic dimensions: batch"),
        ({"input": ((1, 64), (4, 64))}, r"has 2 shapes: give the smallest, the usual and the largest"),
        ({"input": ((1, 64), (4, 64), (2, 64))}, r"1, 4, 2 is not smallest, usual, largest"),
        ({"input": ((1, 2, 64),) * 3}, r"has 3 dimensions; the input is \[batch, 64\]"),
        ({"input": (1, 32)}, r"changes a fixed dimension of \[batch, 64\]"),
        ({"input": "1x64"}, r"neither three shapes nor one"),
        ({"batch": (1, 4)}, r"a dimension takes three numbers"),
        ({"batch": (-1, 4, 8)}, r"is not smallest, usual, largest"),
    ],
)
def test_shapes(shapes, match, half, tmp_path):
    refused(onelora.ConfigError, match, half, tmp_path, shapes=shapes)


def test_missing_shapes_name_every_input(tmp_path):
    bank, _ = engines.linear(tmp_path, "bank")
    with pytest.raises(onelora.ConfigError, match=r"missing for input \[batch, 64\], adapter_ids \[batch\]"):
        build_engine(bank, tmp_path / "m.engine", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "sm_87"}, r"builds for sm_75, sm_80, sm_86, .*not for sm_87. Engines for Jetson .* on the device"),
        ({"target": "orin"}, r"target='orin' is not of the form 'sm_86'"),
        ({"flavour": "trt"}, r"flavour='trt' is not one of 'auto', 'tensorrt', 'rtx'"),
        ({"precision": "fp16"}, r"has no flag for precision='fp16': export the model with dtype=torch.float16"),
        ({"precision": "half"}, r"precision='half' is not one of 'fp16'"),
        ({"optimization_level": 9}, r"optimization_level=9 is not between 0 and 5"),
        ({"workspace": 0}, r"workspace=0 is not a number of bytes"),
        ({"dla_core": 0}, r"dla_core=0: this device has none. Deep learning accelerators are in Xavier and Orin"),
        ({"adapters": "merge"}, r"adapters='merge' is not one of 'fold', 'input', 'bank', 'refit'"),
        ({"adapters": "input"}, r"which is of mode 'fold': export the model with adapters='input'"),
        ({"adapters": "refit"}, r"which is of mode 'fold': export the model with adapters='input'"),
    ],
)
def test_options(options, match, half, tmp_path):
    refused(onelora.ConfigError, match, half, tmp_path, **BATCH | options)


def parsed(path):
    """The model of one linear in TensorRT-RTX, before anything is said of sizes and targets."""
    api = library.find_api("rtx")
    build = Build(api.trt, api.logger, strong=True)
    build.parse(str(path))
    api.messages.clear()
    return api, build


def test_the_target_of_this_machine_without_a_gpu(half, tmp_path):
    """TensorRT itself says that there is no driver; what to do is ours."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    api, build = parsed(half)
    build.targets(["CURRENT"])
    build.profile({"input": [(1, 64)] * 3})
    with pytest.raises(onelora.ExportError, match=r"There is no GPU \(or its driver is too old\): name target='sm_86'"):
        with in_our_words(half, api):
            build.plan(Line())


def test_no_profile_in_nvidias_words(half):
    """The message that our own check comes before is known too."""
    api, build = parsed(half)
    match = r"can't be built into an engine: .*no optimization profile has been defined.*Give shapes= for the dynamic"
    with pytest.raises(onelora.ExportError, match=match):
        with in_our_words(half, api):
            build.plan(Line())


def test_a_workspace_that_is_too_small(single, tmp_path):
    match = r"no tactics to implement the operation within workspace limit.*Give a larger workspace="
    refused(onelora.ExportError, match, single, tmp_path, workspace=1, **BATCH)


def test_float32_for_turing(single, tmp_path):
    match = r"FP32 GEMM is not supported.* export the model with dtype=torch.float16"
    refused(onelora.ExportError, match, single, tmp_path, target="sm_75", **BATCH)


def test_refit_without_a_gpu(swappable, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    match = r"A refittable engine can be built only where the GPU is"
    refused(onelora.ExportError, match, swappable, tmp_path, adapters="refit", **BATCH)


def test_refit_is_built_with_distinct_vectors(tmp_path):
    torch.manual_seed(0)
    model = onelora.adapt(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 48)))
    x = torch.randn(4, 64)
    export_onnx(model, (x,), tmp_path / "zero.onnx", adapters="input", verify=False)
    with pytest.raises(onelora.StateError, match=r"the vector of '[01]' in .* is zero: .* give adapter="):
        build_engine(tmp_path / "zero.onnx", tmp_path / "m.engine", adapters="refit", **OPTIONS)
    with torch.no_grad():
        for vector in onelora.vectors(model).values():
            vector.fill_(0.5)
    export_onnx(model, (x,), tmp_path / "equal.onnx", adapters="input", verify=False)
    with pytest.raises(onelora.StateError, match=r"'[01]' in .* is equal to that of '[01]'"):
        build_engine(tmp_path / "equal.onnx", tmp_path / "m.engine", adapters="refit", **OPTIONS)


def save(path, nodes, inputs, arrays=(), opset=17):
    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def test_an_operator_that_tensorrt_does_not_have(tmp_path):
    path = save(
        tmp_path / "m.onnx", [onnx.helper.make_node("Frobnicate", ["x"], ["y"], "the node")], [("x", 1, [2, 3])]
    )
    match = r"node the node \(Frobnicate\): .*no such operator.*Export with a lower opset_version="
    with pytest.raises(onelora.ExportError, match=match):
        build_engine(path, tmp_path / "m.engine", **OPTIONS)


def test_mixed_dtypes(tmp_path):
    weight = np.ones((3,), np.float16)
    nodes = [onnx.helper.make_node("Mul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [("x", 1, [2, 3])], [("w", weight)])
    with pytest.raises(onelora.ExportError, match=r"must agree in the ONNX.*dtype=torch.float16"):
        build_engine(path, tmp_path / "m.engine", **OPTIONS)


def test_a_bias_that_is_quantised(tmp_path):
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["b", "s"], ["c"]),
        onnx.helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    arrays = [("b", np.ones(3, np.int32)), ("s", np.float32(0.1))]
    path = save(tmp_path / "m.onnx", nodes, [("x", 1, [2, 3])], arrays)
    with pytest.raises(onelora.ExportError, match=r"'QuantizeBias': False"):
        build_engine(path, tmp_path / "m.engine", **OPTIONS)


def test_float8_for_a_gpu_without_it(tmp_path):
    scale = ("s", np.float32(0.1))
    zero = onnx.helper.make_tensor("z", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        onnx.helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, [("x", 1, [16, 64])], [scale, ("w", np.ones((64, 48), np.float32))], 19)
    model = onnx.load(path)
    model.graph.initializer.append(zero)
    onnx.save(model, path)
    with pytest.raises(onelora.ExportError, match=r"fp8 needs SM 8.9"):
        build_engine(path, tmp_path / "m.engine", **OPTIONS)
    assert build_engine(path, tmp_path / "m.engine", **OPTIONS | {"target": "sm_89"}).bytes


def test_files(half, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        build_engine(tmp_path / "no.onnx", tmp_path / "m.engine", **OPTIONS)
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07nonsense")
    with pytest.raises(onelora.ExportError, match="not an ONNX model"):
        build_engine(tmp_path / "bad.onnx", tmp_path / "m.engine", **OPTIONS)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        build_engine(half, tmp_path / "no" / "m.engine", **RTX)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        build_engine(half, tmp_path, **RTX)


def test_weights_that_are_missing(tmp_path):
    torch.manual_seed(0)
    export_onnx(nn.Linear(64, 48), (torch.randn(4, 64),), tmp_path / "m.onnx", external_data=True)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.onnx\.data with its weights is missing"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", **OPTIONS)


def test_adapters_of_other_models(swappable, half, tmp_path):
    torch.manual_seed(3)
    other = fill_vectors(onelora.adapt(nn.Sequential(nn.Linear(64, 48))), 0.3)
    onelora.save_adapter(other, tmp_path / "other.safetensors")
    named = fill_vectors(onelora.adapt(nn.ModuleDict({"x": nn.Linear(64, 48)})), 0.3)
    onelora.save_adapter(named, tmp_path / "named.safetensors")
    options = {**RTX}
    with pytest.raises(onelora.BaseMismatchError, match="another base"):
        build_engine(swappable, tmp_path / "m.engine", adapter=tmp_path / "other.safetensors", **options)
    with pytest.raises(onelora.AdapterFileError, match="has no place for vectors of the adapter: x"):
        build_engine(swappable, tmp_path / "m.engine", adapter=tmp_path / "named.safetensors", **options)
    with pytest.raises(onelora.StateError, match=r"holds its adapter already \(mode 'fold'\)"):
        build_engine(half, tmp_path / "m.engine", adapter=tmp_path / "other.safetensors", **options)
    assert not (tmp_path / "m.engine").exists()


def test_vectors_that_a_tool_removed(swappable, tmp_path):
    model = ir.load(swappable)
    (vector,) = [value for value in model.graph.inputs if value.name in model.graph.initializers]
    model.graph.initializers.pop(str(vector.name))
    ir.save(model, tmp_path / "m.onnx")
    with pytest.raises(onelora.AdapterFileError, match=r"has no initializers of these names"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", **RTX)


def test_a_failed_build_leaves_the_old_engine(half, tmp_path):
    build_engine(half, tmp_path / "m.engine", **RTX)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(onelora.ConfigError):
        build_engine(half, tmp_path / "m.engine", **OPTIONS)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_ctrl_c_stops_the_builder(half, tmp_path, monkeypatch):
    from onelora_compile.progress import Count

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Count, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_engine(half, tmp_path / "m.engine", **RTX)
    assert os.listdir(tmp_path) == []


def test_the_bar_shows_the_builders_phases(half, tmp_path, monkeypatch):
    from onelora_compile.progress import Count

    seen, steps = [], []
    monkeypatch.setattr(Count, "start", lambda self, stage, total: seen.append((stage, total)))
    monkeypatch.setattr(Count, "step", lambda self: steps.append(1))
    build_engine(half, tmp_path / "m.engine", **RTX)
    assert len(seen) >= 2
    assert all(total > 0 for _, total in seen)
    assert steps
