"""Weights that a forward reads by way of other code: whatever spells it, the use is adapted or named."""

import functools
import operator
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy
from onelora_compile.weight_uses import model_code
from onelora_compile.weight_uses.follow_forward import follow


def helper(x, linear):
    return F.linear(x, linear.weight)


def about(x, linear):
    return x.to(linear.weight.dtype)[:, : linear.weight.shape[0]]


def decorated(function):
    @functools.wraps(function)
    def run(*args):
        return function(*args)

    return run


class Helpers:
    table: dict = {}

    @staticmethod
    def static(x, linear):
        return x @ linear.weight.T

    def method(self, x, linear):
        return self.table["helper"](x, linear)

    @property
    def by_property(self):
        return helper

    def __call__(self, x, linear):
        return helper(x, linear)

    def __getattr__(self, name):  # answers to everything
        if name.startswith("__"):
            raise AttributeError(name)
        return self


@torch.compile(backend="eager")
def compiled_helper(x, weight):
    return F.linear(x, weight)


class Child(nn.Module):
    def forward(self, x, weight):
        return F.linear(x, weight)

    def other(self, x, linear):
        return helper(x, linear)


class Reader(nn.Module):
    """Reads the weight of what it is given."""

    def forward(self, x, given, key=None):
        linear = given if key is None else given.b if key == "b" else given[key]
        return F.linear(x, linear.weight) if isinstance(linear, nn.Linear) else linear(x)


class NeedsTensors(nn.Module):
    """Can't be followed: it asks what it gets for its class, as PEFT's DoRA does."""

    def forward(self, linear):
        if not isinstance(linear.weight, torch.Tensor):
            raise TypeError("no tensor")
        return linear.weight.norm(dim=-1)


class Pair(nn.Module):
    def forward(self, pair):
        return F.linear(*pair)


TABLE = {"a": [helper]}
Helpers.table["helper"] = helper
MODULE = types.ModuleType("a_module_of_helpers")
vars(MODULE)["go"] = helper

# How a forward gets at the weight of `b`, which it never calls.
READS = {
    "function": lambda s, x: helper(x, s.b),
    "decorated": lambda s, x: decorated(helper)(x, s.b),
    "static": lambda s, x: Helpers.static(x, s.b),
    "method": lambda s, x: s.helpers.method(x, s.b),
    "property": lambda s, x: s.helpers.by_property(x, s.b),
    "object": lambda s, x: s.helpers(x, s.b),
    "table": lambda s, x: TABLE["a"][0](x, s.b),
    "partial": lambda s, x: functools.partial(helper, linear=s.b)(x),
    "instance": lambda s, x: s.functions[0](x, s.b),
    "module": lambda s, x: MODULE.go(x, s.b),
    "child": lambda s, x: s.child.other(x, s.b),
    "getattr": lambda s, x: F.linear(x, getattr(s.b, "weight")),  # noqa: B009
    "attrgetter": lambda s, x: F.linear(x, operator.attrgetter("b.weight")(s)),
    "class": lambda s, x: nn.Linear.forward(s.b, x),
    "forward": lambda s, x: nn.Linear.forward(s.b, x) - s.b.bias,
    "given_to_a_child": lambda s, x: s.child(x, s.b.weight),
    "given_module": lambda s, x: s.reader(x, s.b),
    "given_as_keyword": lambda s, x: s.reader(given=s.b, x=x),
    "given_in_a_list": lambda s, x: s.reader(x, [x, s.b], 1),
    "given_in_a_dictionary": lambda s, x: s.reader(x, {"one": {"two": s.b}}["one"], "two"),
    "given_list_of_modules": lambda s, x: s.reader(x, nn.ModuleList([s.a, s.b]), 1),
    "given_itself": lambda s, x: s.reader(x, s, "b"),
    "given_closure": lambda s, x: s.reader(x, lambda y: F.linear(y, s.b.weight)),
    "given_method": lambda s, x: s.reader(x, s.own),
    "given_partial": lambda s, x: s.reader(x, functools.partial(helper, linear=s.b)),
    "while_training": lambda s, x: F.linear(x, s.b.weight) if s.training else s.b(x) - s.b.bias,
    "in_evaluation": lambda s, x: s.b(x) - s.b.bias if s.training else F.linear(x, s.b.weight),
    "compiled": lambda s, x: compiled_helper(x, s.b.weight),
    "vmap": lambda s, x: torch.vmap(lambda row: F.linear(row, s.b.weight))(x),
    "vmap_of_the_weight": lambda s, x: torch.vmap(torch.mv, in_dims=(None, 0))(s.b.weight, x),
    "jvp": lambda s, x: torch.func.jvp(lambda v: F.linear(v, s.b.weight), (x,), (x,))[0],
    "derivative": lambda s, x: torch.func.grad(lambda v: F.linear(v, s.b.weight).sin().sum())(x),
    "cond": lambda s, x: torch.cond(x.sum() > 0, lambda v: F.linear(v, s.b.weight), lambda v: v @ s.b.weight.T, (x,)),
    "detached": lambda s, x: F.linear(x, s.b.weight.detach()) + 0 * s.b(x),
}
# Uses of the weight of `b`, which is called too, that are no linear op: they see W + vector 1ᵀ, as after a merge.
READS |= {
    "penalty": lambda s, x: s.b(x) + s.b.weight.square().sum(),
    "norm_that_can_not_be_followed": lambda s, x: s.b(x) / s.needs_tensors(s.b),
    "norm_elsewhere": lambda s, x: s.b(x) / s.reader(x, lambda y: s.b.weight.norm(dim=-1)),
    "norm": lambda s, x: s.b(x) / s.b.weight.norm(dim=-1),
    "element": lambda s, x: s.b(x) + (x * s.b.weight[0]).sum(-1, keepdim=True),
    "comparison": lambda s, x: s.b(x) * (s.b.weight > 0).any(-1),
    "operator": lambda s, x: s.b(x) + (s.b.weight + 1)[:, 0],
}
# Past the attribute: nothing can hand these out adapted.
PAST = {
    "dictionary": lambda s, x: F.linear(x, s.b._parameters["weight"]),
    "named_parameters": lambda s, x: F.linear(x, dict(s.b.named_parameters())["weight"]),
    "also_an_attribute": lambda s, x: F.linear(x, s.b._parameters["weight"]) + helper(x, s.b),
    "get_parameter": lambda s, x: F.linear(x, s.get_parameter("b.weight")),
    "next": lambda s, x: F.linear(x, next(s.b.parameters())),
    "state_dict": lambda s, x: F.linear(x, s.b.state_dict()["weight"]),
    "own": lambda s, x: x @ s._parameters["w"],
    "own_list": lambda s, x: x @ next(iter(s.parameters(recurse=False))),
}


def build(forward, **parameters):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.child, self.helpers = nn.Linear(8, 8), nn.Linear(8, 6), Child(), Helpers()
            self.functions, self.reader, self.needs_tensors = [helper], Reader(), NeedsTensors()
            for name, parameter in parameters.items():
                self.register_parameter(name, parameter)

        def own(self, x):
            return F.linear(x, self.b.weight)

    Model.forward = lambda self, x: forward(self, torch.tanh(self.a(x)))
    torch.manual_seed(0)
    return Model(), torch.randn(5, 8)


def compiled(model):
    return torch.compile(model, backend="onelora", options={"inner": "eager"})


@pytest.mark.parametrize("name", READS)
def test_a_weight_that_other_code_reads_is_adapted(name):
    model, x = build(READS[name])
    base = model(x)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["a", "b"]
    assert torch.equal(model(x), base)
    fill_vectors(model, 0.5)
    reference = merged_copy(model, torch.float64)(x.double())
    for run in (model, compiled(model)):
        torch.testing.assert_close(run(x).double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairs", [Pair, lambda: nn.Sequential(nn.Sequential(Pair()))])
def test_a_parameter_of_its_own_that_is_handed_on_is_adapted(pairs):
    model, x = build(lambda s, x: s.pairs((x, s.w)), w=nn.Parameter(torch.randn(6, 8)))
    model.pairs = pairs()
    onelora.adapt(model)
    assert {"w", "a"} <= set(onelora.vectors(model))
    fill_vectors(model, 0.5)
    torch.testing.assert_close(model(x), merged_copy(model)(x))


@pytest.mark.parametrize("name", PAST)
def test_a_weight_that_is_taken_past_its_attribute_is_named(name):
    own = {"w": nn.Parameter(torch.randn(8, 6))} if name.startswith("own") else {}
    model, x = build(PAST[name], **own)
    onelora.adapt(model)
    known = onelora.summary(model).skipped
    (key,) = own or ("b",)
    assert "out of a dictionary or a list" in known[key]
    assert key not in onelora.vectors(model)
    fill_vectors(model, 0.5)
    expected = model(x)
    torch.testing.assert_close(merged_copy(model)(x), expected)
    torch.testing.assert_close(compiled(model)(x), expected)  # a warning would be an error
    assert onelora.summary(model).skipped == known


def test_modules_that_are_alike_are_followed_once(monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return about(self.b(x), self.a)

    followed = []

    def noted(*args):
        followed.append(args[0])
        return follow(*args)

    monkeypatch.setattr(model_code, "follow", noted)
    model = nn.Sequential(Model(), Model(), Model())
    onelora.adapt(model)  # a question for a dtype is no read
    assert list(onelora.vectors(model)) == [f"{block}.{name}" for block in range(3) for name in "ab"]
    assert set(followed) == {model[0]}
