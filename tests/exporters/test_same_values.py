"""Which values of a file are one value: never two that may differ in a run."""

import onnx
import onnx_ir
import pytest

from onelora_compile.exporters.fold.same_values import SameValues

HEADER = '<ir_version: 10, opset_import: ["": 18]> m (float[2] x, float[2] z, bool c) => (float[2] a, float[2] b) '


def times(one, other):
    """x times a constant each."""
    return f"t = Constant<{one}>() a = Mul(x, t) u = Constant<{other}>() b = Mul(x, u)"


# What computes a and b, and whether that is the same.
PAIRS = {
    "the same": ("t = Sin(x) a = Mul(t, z) u = Sin(x) b = Mul(u, z)", True),
    "another input": ("a = Mul(x, z) b = Mul(z, z)", False),
    "another order": ("a = Sub(x, z) b = Sub(z, x)", False),
    "another operator": ("a = Sin(x) b = Cos(x)", False),
    "equal constants": (times("value_floats=[1.0, 2.0]", "value_floats=[1.0, 2.0]"), True),
    "other constants": (times("value_floats=[1.0, 2.0]", "value_floats=[1.0, 3.0]"), False),
    "equal tensors": (times("value=float[2] {1, 2}", "value=float[2] {1, 2}"), True),
    "other tensors": (times("value=float[2] {1, 2}", "value=float[2] {1, 3}"), False),
    "another attribute": ("a = Elu<alpha=1.0>(x) b = Elu<alpha=2.0>(x)", False),
    "another output": ("a, b = Split<axis=0, num_outputs=2>(x)", False),
    "drawn twice": ("t = RandomUniformLike(x) a = Mul(t, z) u = RandomUniformLike(x) b = Mul(u, z)", False),
    "a branch each": (
        "a = If(c) <then_branch = g () => (float[2] p) {p = Sin(x)}, else_branch = h () => (float[2] q) {q = Cos(x)}>"
        "b = If(c) <then_branch = g () => (float[2] p) {p = Sin(x)}, else_branch = h () => (float[2] q) {q = Tan(x)}>",
        False,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_are_the_same_where_every_run_makes_them_equal(name):
    body, same = PAIRS[name]
    model = onnx_ir.from_proto(onnx.parser.parse_model(HEADER + "{" + body + "}"))
    values = SameValues()
    first, second = (values.number(one) for one in model.graph.outputs)
    assert (first == second) == same


def test_an_initializer_is_itself_alone():
    body = "<float[2] v = {1, 2}, float[2] w = {1, 2}> {t = Mul(x, v) a = Sin(t) u = Mul(x, w) b = Sin(u)}"
    model = onnx_ir.from_proto(onnx.parser.parse_model(HEADER + body))
    values = SameValues()
    first, second = (values.number(one) for one in model.graph.outputs)
    assert first != second
    assert values.number(model.graph.outputs[0]) == first


def test_a_long_chain():
    body = "t0 = Sin(x)" + "".join(f" t{i + 1} = Sin(t{i})" for i in range(3000)) + " a = Sin(t3000) b = Sin(t3000)"
    model = onnx_ir.from_proto(onnx.parser.parse_model(HEADER + "{" + body + "}"))
    values = SameValues()
    assert len({values.number(one) for one in model.graph.outputs}) == 1
