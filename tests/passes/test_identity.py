"""Ops are told by identity, and read by their schema."""

import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from onelora_compile.ops import ADAPTED_WEIGHT, RANK1_UPDATE
from onelora_compile.passes import match_linear, weight_to_activation
from onelora_compile.passes.graph.writes import mutates
from onelora_compile.passes.sites.operators import arguments, as_operator, op_name
from onelora_compile.passes.sites.weight_path import weight_chains

_library = torch.library.Library("onelora_test_identity", "DEF")
for _schema in (
    *("linear(Tensor x, Tensor w) -> Tensor", "matmul(Tensor x, Tensor w) -> Tensor", "t(Tensor w) -> Tensor"),
    *("einsum(str equation, Tensor[] xs) -> Tensor", "view(Tensor w, int[] shape) -> Tensor"),
    *("layer_norm(Tensor x, int[] shape) -> Tensor", "write(Tensor(a!) x) -> ()"),
    *("select.Dimname(Tensor x, str dim, int index) -> Tensor", "select.int(Tensor x, int dim, int index) -> Tensor"),
):
    _library.define(_schema)
MINE = torch.ops.onelora_test_identity


def named(name):
    """A Python function that is called like one of PyTorch's."""

    def function(*args, **kwargs):
        raise AssertionError

    function.__name__ = function.__qualname__ = name
    return function


def graph(*names):
    """A graph with these inputs, of which w is a parameter [8, 8] and x an activation [5, 8]."""
    own = fx.Graph()
    nodes = [own.placeholder(name) for name in names]
    for node in nodes:
        value = torch.empty(8, 8) if node.name == "w" else torch.empty(5, 8)
        node.meta["example_value"] = nn.Parameter(value) if node.name == "w" else value
    return own, *nodes


STRANGERS = {
    "overload": lambda name: getattr(MINE, name).default,
    "packet": lambda name: getattr(MINE, name),
    "function": named,
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("name", ["linear", "matmul"])
def test_a_stranger_of_that_name_is_no_linear(kind, name):
    own, x, w = graph("x", "w")
    own.call_function(STRANGERS[kind](name), (x, w))
    assert match_linear(fx.GraphModule({}, own)) == []
    own.call_function(F.linear, (x, w))
    assert len(match_linear(fx.GraphModule({}, own))) == 1


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("name", ["t", "view"])
def test_a_stranger_of_that_name_is_no_view(kind, name):
    own, w = graph("w")
    strange = own.call_function(STRANGERS[kind](name), (w, [8, 8])[: 1 + (name == "view")])
    real = own.call_method("view", (w, 8, 8))
    chains = weight_chains(fx.GraphModule({}, own))
    assert strange not in chains
    assert real in chains


@pytest.mark.parametrize("kind", STRANGERS)
def test_strangers_are_no_norms(kind):
    own, x = graph("x")
    assert op_name(own.call_function(STRANGERS[kind]("layer_norm"), (x, [8]))) != "layer_norm"


def test_what_a_stranger_does_to_its_inputs():
    own, x = graph("x")
    own.output(x)
    gm = fx.GraphModule({}, own)
    for function, expected in (
        (named("relu"), True),  # nobody knows
        (MINE.write, True),
        (MINE.write.default, True),
        (MINE.t, False),
        (torch.relu, False),
        (torch.ops.aten.relu_, True),
        (torch.ops.aten.relu, False),
        (operator.iadd, True),
    ):
        assert mutates(gm, own.call_function(function, (x,))) is expected, function
    assert not mutates(gm, own.call_function(torch.sum, (x, -1, True)))
    assert mutates(gm, own.call_function(F.hardtanh, (x, -1.0, 1.0, True)))


def test_a_method_counts_on_a_tensor_only():
    own, x, w = graph("x", "w")
    assert op_name(own.call_method("matmul", (x, w))) == "matmul"
    x.meta["example_value"] = "no tensor"
    assert op_name(own.call_method("matmul", (x, w))) == ""
    assert op_name(own.call_method("my_method", (w,))) == ""


def test_a_later_patch_of_pytorch_is_a_stranger(monkeypatch):
    strange = named("linear")
    monkeypatch.setattr(F, "linear", strange)
    own, x, w = graph("x", "w")
    assert op_name(own.call_function(F.linear, (x, w))) == ""


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        (torch.addmm, "cxw", {"alpha": 2}, {"self": "c", "mat1": "x", "mat2": "w", "alpha": 2, "beta": 1}),
        (torch.addmm, "c", {"mat2": "w", "mat1": "x"}, {"self": "c", "mat1": "x", "mat2": "w"}),
        (torch.addmm, "", {"input": "c", "mat2": "w", "mat1": "x"}, {"self": "c", "mat1": "x", "mat2": "w"}),
        (torch.ops.aten.addmm_, "cxw", {"beta": 0}, {"self": "c", "beta": 0}),
        (torch.Tensor.addmm, "cxw", {}, {"self": "c", "alpha": 1}),
        (torch.bmm, "xw", {"out": "c"}, {"self": "x", "mat2": "w", "out": "c"}),
        (F.linear, "xw", {}, {"input": "x", "weight": "w", "bias": None}),
        (F.conv1d, "xw", {"padding": "valid"}, {"padding": "valid", "groups": 1}),
        (torch.tensordot, "xw", {}, {"a": "x", "b": "w", "dims": 2}),
    ],
)
def test_arguments_by_the_names_of_the_schema(function, args, kwargs, expected):
    own, *nodes = graph("c", "x", "w")
    held = {node.name: node for node in nodes}
    given = {name: held.get(value, value) for name, value in kwargs.items()}
    found = arguments(own.call_function(function, tuple(held[name] for name in args), given))
    assert found is not None
    assert {name: found[name] for name in expected} == {n: held.get(v, v) for n, v in expected.items()}


def test_what_no_schema_takes_is_not_understood():
    own, c, x, w = graph("c", "x", "w")
    legacy = own.call_function(torch.addmm, (2, c, x, w))  # (beta, input, mat1, mat2), deprecated for years
    assert arguments(legacy) is None
    assert match_linear(fx.GraphModule({}, own)) == []


@pytest.mark.parametrize("how", ["addmm_", "out"])
def test_an_op_that_writes_keeps_its_adapted_weight_and_says_why(how):
    own, c, x, w = graph("c", "x", "w")
    c.meta["example_value"] = torch.empty(5, 8)
    vector = own.placeholder("b")
    vector.meta["example_value"] = torch.empty(8)
    adapted = own.call_function(ADAPTED_WEIGHT, (w, vector, [0]))
    adapted.meta["example_value"] = torch.empty(8, 8)
    if how == "out":
        y = own.call_function(torch.mm, (x, adapted), {"out": c})
    else:
        y = own.call_method("addmm_", (c, x, adapted))
    y.meta["example_value"] = torch.empty(5, 8)
    own.output(y)
    gm = fx.GraphModule({}, own)
    result = weight_to_activation(gm)
    assert not result.rewrites
    assert "writes into a tensor" in result.skips[y.name]
    assert adapted.users
    assert not any(node.target is RANK1_UPDATE for node in own.nodes)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda own, x: own.call_method("squeeze", (x, -1)), "aten.squeeze.dim"),
        (lambda own, x: own.call_method("transpose", (x, -1, -2)), "aten.transpose.int"),
        (lambda own, x: own.call_method("movedim", (x, [0, 1], [1, 0])), "aten.movedim.intlist"),
        (lambda own, x: own.call_function(torch.permute, (x,), {"dims": [1, 0]}), "aten.permute.default"),
        (lambda own, x: own.call_function(torch.ops.aten.relu.default, (x,)), "aten.relu.default"),
    ],
)
def test_functions_and_methods_as_operators(call, expected):
    own, x = graph("x")
    node = call(own, x)
    before = list(own.find_nodes(op=node.op, target=node.target))
    as_operator(node)
    assert (node.op, str(node.target)) == ("call_function", expected)
    assert list(own.find_nodes(op="call_function", target=node.target)) == before
    own.output(node)
    value = torch.randn(5, 1)
    assert torch.is_tensor(fx.GraphModule({}, own)(value))


def test_an_axis_by_its_number_is_no_axis_by_its_name():
    """PyTorch 2.11 lists the overloads with names of axes first, and any order is right."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    by_number = graph.call_function(MINE.select, (x, -1, 0))
    by_name = graph.call_function(MINE.select, (x, "rows", 0))
    as_operator(by_number)
    as_operator(by_name)
    assert (by_number.target, by_name.target) == (MINE.select.int, MINE.select.Dimname)
