"""fold_onnx: a weight that a body of If or Loop gives to what stands around it is refused, by what reads it there."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import adapter_of, assert_arrays, session

from onelora_compile.errors import ExportError
from onelora_compile.exporters import fold_onnx

W = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
value = helper.make_tensor_value_info


def chosen(name, moved, last, beside):
    """y of a product with what an If gives: the weight, or zeros; beside it there may be a plain product."""
    passes = [helper.make_node("Transpose", ["w"], [name], perm=[1, 0])] if moved else []
    passes = passes or [helper.make_node("Identity", ["w"], [name])]
    then = helper.make_graph(passes, "then", [], [value(name, TensorProto.FLOAT, [8, 8])])
    zeros = helper.make_node("ConstantOfShape", ["shape"], ["none"])
    other = helper.make_graph([zeros], "else", [], [value("none", TensorProto.FLOAT, [8, 8])])
    nodes = [helper.make_node("If", ["flag"], ["v"], "choice", then_branch=then, else_branch=other)]
    nodes += [last] if last else []
    nodes += [helper.make_node("MatMul", ["x", "w"], ["z"], "plain")] if beside else []
    arrays = {"w": W, "flag": np.array(True), "shape": np.array([8, 8])}
    outputs = [value("y" if last else "v", TensorProto.FLOAT, [3, 8] if last else [8, 8])]
    outputs += [value("z", TensorProto.FLOAT, [3, 8])] if beside else []
    held = [numpy_helper.from_array(array, one) for one, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, [3, 8])], outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def repeated():
    """A product with the weight that a Loop carries on."""
    going = [
        value("i", TensorProto.INT64, []),
        value("go", TensorProto.BOOL, []),
        value("v", TensorProto.FLOAT, [8, 8]),
    ]
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["w"], ["next"])]
    given = [value("on", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, [8, 8])]
    body = helper.make_graph(nodes, "body", going, given)
    nodes = [
        helper.make_node("Loop", ["n", "flag", "start"], ["v_last"], "again", body=body),
        helper.make_node("MatMul", ["x", "v_last"], ["y"], "product"),
    ]
    arrays = {"w": W, "flag": np.array(True), "n": np.array(2), "start": np.zeros((8, 8), np.float32)}
    held = [numpy_helper.from_array(array, one) for one, array in arrays.items()]
    outputs = [value("y", TensorProto.FLOAT, [3, 8])]
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, [3, 8])], outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


PRODUCT = helper.make_node("MatMul", ["x", "v"], ["y"], "product")
BEHIND = r"MatMul 'product', behind If 'choice', a body of which gives it"
CASES = {
    "only": (chosen("p", False, PRODUCT, False), rf"not used by a linear op but by {BEHIND}"),
    "moved": (chosen("p", True, PRODUCT, False), rf"not used by a linear op but by {BEHIND}"),
    "beside a product": (chosen("p", False, PRODUCT, True), rf"also goes into {BEHIND}, which is not followed"),
    "returned": (chosen("p", False, None, False), r"not used by a linear op but by the output of the file that it is"),
    "loop": (repeated(), r"not used by a linear op but by MatMul 'product', behind Loop 'again'"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_reads_a_weight_behind_a_body_is_named(case, tmp_path):
    model, message = CASES[case]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "m.onnx")
    adapter, _ = adapter_of(tmp_path, W.T)
    with pytest.raises(ExportError, match=message):
        fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx", progress=False)
    assert not (tmp_path / "out.onnx").exists()


def test_a_weight_that_is_returned_out_of_a_body_stays_the_bases(tmp_path):
    onnx.save(chosen("p", False, None, True), tmp_path / "m.onnx")
    adapter, (vector,) = adapter_of(tmp_path, W.T)
    fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx", progress=False)
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    returned, product = session(tmp_path / "out.onnx").run(None, {"x": x})
    np.testing.assert_array_equal(returned, W)
    assert_arrays(product, x.astype(np.float64) @ (W + vector), x @ (W + vector).astype(np.float32))
