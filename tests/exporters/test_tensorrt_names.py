"""Every name of TensorRT's API that our code uses is in each version, or is asked for before: without any GPU."""

import ast
import json
from pathlib import Path

import pytest
import tensorrt_bindings

import onelora_compile.exporters as exporters
from onelora_compile.exporters.jetson.device.core.logger import Messages
from onelora_compile.exporters.tensorrt import library, precision

RECORD = json.loads(tensorrt_bindings.RECORD.read_text())
OURS = ("tensorrt/*.py", "jetson/device/trt_build.py", "jetson/device/core/*.py")
FILES = [path for pattern in OURS for path in sorted(Path(exporters.__file__).parent.glob(pattern))]

# What our code calls the objects of TensorRT.
RECEIVERS = {
    "trt": "module",
    "api.trt": "module",
    "self.api.trt": "module",
    "self.trt": "module",
    "builder": "Builder",
    "build.builder": "Builder",
    "self.builder": "Builder",
    "network": "INetworkDefinition",
    "self.network": "INetworkDefinition",
    "build.network": "INetworkDefinition",
    "api.trt.INetworkDefinition": "INetworkDefinition",
    "config": "IBuilderConfig",
    "build.config": "IBuilderConfig",
    "self.config": "IBuilderConfig",
    "parser": "OnnxParser",
    "error": "ParserError",
    "runtime": "Runtime",
    "self.runtime": "Runtime",
    "loaded": "ICudaEngine",
    "self.loaded": "ICudaEngine",
    "engine.loaded": "ICudaEngine",
    "engine.trt": "module",
    "self.context": "IExecutionContext",
    "refitter": "Refitter",
    "optimization_profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "layer": "ILayer",
    "network.get_input(index)": "ITensor",
    "layer.get_output(0)": "ITensor",
    "serialization": "ISerializationConfig",
}

# Not in every version: the name that our code asks for before it uses them.
GUARDED = {
    ("ParserError", "node_name"): "node_name",
    ("ParserError", "node_operator"): "node_name",
    ("IBuilderConfig", "progress_monitor"): "progress_monitor",
    ("IBuilderConfig", "builder_optimization_level"): "builder_optimization_level",  # not in 8.5, which has no wheel
    ("IBuilderConfig", "num_compute_capabilities"): "ComputeCapability",
    ("IBuilderConfig", "set_compute_capability"): "ComputeCapability",
    ("INetworkDefinition", "mark_weights_refittable"): "mark_weights_refittable",
    ("ICudaEngine", "create_serialization_config"): "create_serialization_config",
    ("ICudaEngine", "serialize_with_config"): "create_serialization_config",
    ("ISerializationConfig", "set_flag"): "create_serialization_config",
}


def uses(tree):
    """(class, name, number of positional arguments or None) of every use of the API in a file."""
    calls = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in RECEIVERS and node.attr[0] != "_":
            yield RECEIVERS[ast.unparse(node.value)], node.attr, calls.get(id(node))


def asked_for(tree):
    """The names that a file asks for with hasattr, getattr or Api.flag."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("hasattr", "getattr", "flag"):
            yield from (one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str))


TREES = {file: ast.parse(file.read_text()) for file in FILES}
USES = sorted({use for tree in TREES.values() for use in uses(tree)}, key=str)
ASKED = {name for tree in TREES.values() for name in asked_for(tree)}


def problems(used, version):
    record = RECORD[version]
    for owner, name, given in used:
        if (owner, name) in GUARDED:
            continue
        members = record.get(owner, {})
        if name not in members and name not in record.get("module", ()):
            yield f"{owner}.{name} is not there"
        elif isinstance(members, dict) and members.get(name) and given is not None:
            if not any(low <= given <= high for low, high in members[name]):
                yield f"{owner}.{name} takes {members[name]} arguments, {given} are given"


def test_the_scan_finds_the_uses():
    found = {f"{owner}.{name}" for owner, name, _ in USES}
    expected = {
        "Builder.build_serialized_network",
        "Builder.create_network",
        "OnnxParser.parse_from_file",
        "IBuilderConfig.set_timing_cache",
        "Refitter.get_missing_weights",
        "IExecutionContext.execute_async_v3",
        "Runtime.deserialize_cuda_engine",
    }
    assert expected <= found
    assert len(found) >= 45


@pytest.mark.parametrize("version", RECORD)
def test_every_name_is_in_this_version_or_is_asked_for(version):
    assert not list(problems(USES, version))


@pytest.mark.parametrize("version", RECORD)
def test_the_check_can_fail(version):
    assert list(problems([("Builder", "build_cuda_graph", 1)], version))
    assert list(problems([("OnnxParser", "parse", 5)], version))


def test_names_that_only_some_versions_have_are_asked_for():
    for (owner, name), guard in GUARDED.items():
        assert any(use[:2] == (owner, name) for use in USES), f"{owner}.{name} is not used any more"
        assert guard in ASKED, guard
        everywhere = all(name in record.get(owner, ()) for record in RECORD.values())
        assert not everywhere or name == "builder_optimization_level", f"{owner}.{name} needs no guard any more"


@pytest.mark.parametrize(
    ("enum", "name", "versions"),
    [
        ("BuilderFlag", "FP16", {"8.6.1", "10.3.0"}),
        ("BuilderFlag", "REFIT_INDIVIDUAL", {"10.3.0", "11.4.0.106", tensorrt_bindings.RTX}),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED", {"10.3.0", "11.4.0.106", tensorrt_bindings.RTX}),
        ("ComputeCapability", "SM86", {tensorrt_bindings.RTX}),
    ],
)
def test_what_the_decisions_hang_on(enum, name, versions):
    assert {version for version, record in RECORD.items() if name in record.get(enum, ())} == versions


class Recorded:
    """A module of a version: its names, without anything behind them."""

    def __init__(self, version):
        self.__version__ = version
        for enum in ("BuilderFlag", "NetworkDefinitionCreationFlag", "ComputeCapability"):
            if enum in RECORD[version]:
                members = {name: index for index, name in enumerate(RECORD[version][enum])}
                setattr(self, enum, type(enum, (), {**members, "__members__": members}))
        self.INetworkDefinition = type("INetworkDefinition", (), dict.fromkeys(RECORD[version]["INetworkDefinition"]))


def api_of(version):
    flavour = "rtx" if version == tensorrt_bindings.RTX else "tensorrt"
    return library.Api(flavour, Recorded(version), None, Messages())


def half_model(tmp_path):
    import onnx_ir as ir

    weight = ir.tensor([[1.0, 2.0]], dtype=ir.DataType.FLOAT16, name="w")
    x = ir.Value(name="x", shape=ir.Shape([2, 1]), type=ir.TensorType(ir.DataType.FLOAT16))
    w = ir.Value(name="w", shape=ir.Shape([1, 2]), type=ir.TensorType(weight.dtype), const_value=weight)
    node = ir.node("MatMul", [x, w])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 18})
    return ir.Model(graph, ir_version=9)


@pytest.mark.parametrize("version", RECORD)
def test_half_precision_is_never_dropped_in_silence(version, tmp_path):
    """By what each version has: strong typing keeps the model's dtypes; without it the flag must be asked for."""
    api, model = api_of(version), half_model(tmp_path)
    if version == "8.6.1":
        with pytest.raises(ValueError, match=r"would compute in float32. Say so: precision='fp16'"):
            precision.typing_of(api, model, None)
    else:
        assert precision.typing_of(api, model, None) == precision.Typing(True, ())
    if version in ("8.6.1", "10.3.0"):
        assert precision.typing_of(api, model, "fp16") == precision.Typing(False, ("FP16",))
    else:
        with pytest.raises(ValueError, match=r"takes dtypes from the ONNX model only .* export the model with dtype="):
            precision.typing_of(api, model, "fp16")


@pytest.mark.parametrize("version", RECORD)
def test_refit_of_single_vectors_is_refused_where_it_is_not_there(version):
    from onelora_compile.exporters.tensorrt.options import check_refit

    if version == "8.6.1":
        with pytest.raises(ValueError, match=r"needs TensorRT 10.2 or newer.*Use adapters='input'"):
            check_refit(api_of(version))
    else:
        check_refit(api_of(version))


def test_no_other_refit_flag_is_ever_set():
    for name, tree in TREES.items():
        asked = set(asked_for(tree)) | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not asked & {"REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"}, name


@pytest.mark.slow
@pytest.mark.parametrize("version", tensorrt_bindings.RECORDED)
def test_the_record_is_what_the_wheels_have(version):
    assert tensorrt_bindings.names_of_wheel(version) == RECORD[version]


def test_the_record_is_what_tensorrt_rtx_has():
    module = pytest.importorskip("tensorrt_rtx_bindings")
    if f"rtx {module.__version__}" == tensorrt_bindings.RTX:
        assert tensorrt_bindings.names(module) == RECORD[tensorrt_bindings.RTX]
