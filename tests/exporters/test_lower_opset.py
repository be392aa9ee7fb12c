"""lower_opset: the same numbers in an older opset, or the operator's name."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onelora_compile as onelora
from onelora_compile.exporters.opsets.lower import lower_opset
from onelora_compile.exporters.opsets.write_out import write_out_norms

F, H = TensorProto.FLOAT, TensorProto.FLOAT16


def model_of(nodes, opset, shape=(3, 8), out=(None, None), dtype=F, constants=(), outputs=("y",)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, out) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def lowered(proto, opset=17, norms=False):
    model = onnx_ir.from_proto(proto)
    if opset < proto.opset_import[0].version:
        lower_opset(model, opset)
    if norms:
        assert write_out_norms(model) == 1
    made = onnx_ir.to_proto(model)
    made.ir_version = 8
    onnx.checker.check_model(made, full_check=True)
    return made


def run(proto, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})


def check(proto, opset=17, tolerance=1e-6, norms=False, shape=(3, 8), dtype=np.float32):
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    made = lowered(proto, opset, norms)
    assert made.opset_import[0].version <= opset
    for expected, found in zip(run(proto, x), run(made, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    return {node.op_type for node in made.graph.node}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    node = helper.make_node("Gelu", ["x"], ["y"], approximate=approximate)
    assert "Gelu" not in check(model_of([node], 20), tolerance=1e-5)
    assert "Gelu" in check(model_of([node], 20), opset=20)


@pytest.mark.parametrize(("size", "count"), [(8, 2), (8, 3), (7, 4)])
def test_split_in_equal_parts(size, count):
    names = tuple(f"y{index}" for index in range(count))
    node = helper.make_node("Split", ["x"], list(names), axis=-1, num_outputs=count)
    check(model_of([node], 18, shape=(3, size), outputs=names), shape=(3, size))


@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceMax", "ReduceL2", "ReduceSum"])
@pytest.mark.parametrize("axes", [[-1], [0, 1], None])
@pytest.mark.parametrize("constant", [True, False])
def test_reductions(kind, axes, constant):
    inputs, nodes, constants = ["x"], [], []
    if axes is not None:
        inputs.append("axes")
        tensor = numpy_helper.from_array(np.array(axes, np.int64), "axes")
        if constant:
            nodes.append(helper.make_node("Constant", [], ["axes"], value=tensor))
        else:
            constants = [("axes", np.array(axes, np.int64))]
    nodes.append(helper.make_node(kind, inputs, ["y"], keepdims=1, noop_with_empty_axes=0))
    check(model_of(nodes, 18, constants=constants), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("opset", [17, 18])
def test_layer_norm_against_float64(dtype, axis, bias, opset):
    kind = F if dtype == np.float32 else H
    shape = (2, 4, 8)
    own = shape[axis:] if axis > 0 else shape[-1:]
    generator = np.random.default_rng(1)
    scale, shift = (generator.normal(size=own).astype(dtype) for _ in range(2))
    inputs = ["x", "s", "b"] if bias else ["x", "s"]
    node = helper.make_node("LayerNormalization", inputs, ["y"], axis=axis, epsilon=1e-3)
    constants = [("s", scale), ("b", shift)][: len(inputs) - 1]
    proto = model_of([node], opset, shape, shape, kind, constants)
    x = (30 * np.random.default_rng(0).normal(size=shape) + 100).astype(dtype)
    made = lowered(proto, 17 if opset == 17 else 18, norms=True)
    assert "LayerNormalization" not in {one.op_type for one in made.graph.node}
    axes = tuple(range(axis % 3, 3))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axes, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-3) * scale + (shift if bias else 0)
    (plain,), (found,) = run(proto, x), run(made, x)
    error, own_error = np.abs(found - expected).max(), np.abs(plain - expected).max()
    assert error <= 2 * own_error + 4 * np.finfo(dtype).eps * np.abs(expected).max()


def test_names_of_outputs_stay():
    node = helper.make_node("Gelu", ["x"], ["y"])
    assert [value.name for value in lowered(model_of([node], 20)).graph.output] == ["y"]


@pytest.mark.parametrize(
    ("nodes", "constants", "message"),
    [
        (
            [helper.make_node("BitwiseNot", ["x"], ["y"], name="here")],
            (),
            r"BitwiseNot 'here' is not in opset 17: export again with opset_version=17 or lower, take a runtime that "
            r"knows opset 18, or change that part of the model",
        ),
        (
            [helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=1)],
            (("s", np.array([1, 0.5], np.float32)),),
            r"Resize '' uses 'antialias', which opset 17 does not have",
        ),
        (
            [helper.make_node("ReduceMax", ["x"], ["y"], noop_with_empty_axes=1)],
            (),
            r"ReduceMax '' reduces nothing",
        ),
    ],
)
def test_what_an_older_opset_can_not_say_is_named(nodes, constants, message):
    with pytest.raises(onelora.ExportError, match=message):
        lower_opset(onnx_ir.from_proto(model_of(nodes, 18, constants=constants)), 17)


def test_an_attribute_with_its_default_is_dropped():
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=0)
    check(model_of([node], 18, constants=(("s", np.array([1, 0.5], np.float32)),)))


def test_split_of_an_unknown_size():
    node = helper.make_node("Split", ["x"], ["y", "z"], axis=0, num_outputs=2)
    proto = model_of([node], 18, shape=("n", 8), outputs=("y", "z"))
    with pytest.raises(onelora.ExportError, match=r"unknown size, which opset 17 has no form for"):
        lower_opset(onnx_ir.from_proto(proto), 17)


def test_a_node_that_two_steps_rewrite_gets_names_of_its_own():
    """Also where an earlier run has written some of them into the file."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], output_dtype=H),
    ]
    constants = [("scale", np.array(0.1, np.float32)), ("zero", np.array(3, np.int8))]
    proto = model_of(nodes, 24, constants=constants)
    proto.graph.output[0].type.tensor_type.elem_type = H
    proto.ir_version = 11
    half = 2.0**-10  # the scale is rounded to float16 as well
    check(proto, tolerance=half)
    between = onnx_ir.from_proto(proto)
    lower_opset(between, 21)
    check(onnx_ir.to_proto(between), tolerance=half)


def test_a_definition_that_onnx_can_not_put_in_is_named():
    x = helper.make_tensor_value_info("x", F, (2, 4, 3, 8))
    kept = helper.make_tensor_value_info("kept", TensorProto.INT64, (2,))
    y = helper.make_tensor_value_info("y", F, (2, 4, 3, 8))
    node = helper.make_node("Attention", ["x", "x", "x", "", "", "", "kept"], ["y"], name="attend")
    graph = helper.make_graph([node], "g", [x, kept], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    with pytest.raises(onelora.ExportError, match=r"Attention 'attend' .*definition.* can't be put in its place"):
        lower_opset(onnx_ir.from_proto(model), 17)
