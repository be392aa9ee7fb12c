"""Weights read by what a call runs besides the forward of the module's class, or past the model's tree: adapted too."""

import functools
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Linear(8, 8)

    def forward(self, x):
        return self.b(x)


def patched(self, x):
    return F.linear(x, self.b.weight)


def of_the_instance(model):
    model.block.forward = types.MethodType(patched, model.block)


def a_lambda(model):
    block = model.block
    block.forward = lambda x: patched(block, x)


def a_partial(model):
    model.block.forward = functools.partial(patched, model.block)


def a_hook(model):
    model.block.b.register_forward_hook(lambda module, given, out: F.linear(given[0], 2 * module.weight) + out)


class Hook:
    def __call__(self, module, given, out):
        return out + F.linear(given[0], module.weight)


class HookModule(nn.Module):
    def forward(self, module, given, out):
        return out + F.linear(given[0], module.weight)


def a_hook_object(model):
    model.block.b.register_forward_hook(Hook())


def a_hook_module(model):
    model.block.b.register_forward_hook(HookModule())


def a_hook_with_keywords(model):
    hook = lambda module, given, named, out: out + F.linear(given[0], module.weight)  # noqa: E731
    model.block.b.register_forward_hook(hook, with_kwargs=True)


def a_hook_before(model):
    model.block.b.register_forward_pre_hook(lambda module, given: (F.linear(given[0], module.weight),))


def a_hook_of_the_block(model):
    model.block.register_forward_hook(lambda module, given, out: out + patched(module, given[0]))


class Called(Block):
    def __call__(self, x):
        return patched(self, x)


def the_call(model):
    model.block = Called()


class CalledLinear(nn.Linear):
    def __call__(self, x):
        return F.linear(x, self.weight)


def the_call_of_a_linear(model):
    model.block.b = CalledLinear(8, 8)


class Reference(nn.Module):
    parent: "Model"

    def __init__(self, model):
        super().__init__()
        self.siblings = [model.block.b]
        object.__setattr__(self, "parent", model)

    def forward(self, x):
        return F.linear(x, self.siblings[0].weight)


def a_sibling_in_a_list(model):
    model.other = Reference(model)


class AsksParent(Reference):
    def forward(self, x):
        return self.parent.product(x)


def a_method_of_the_parent(model):
    model.other = AsksParent(model)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.other, self.out = Block(), nn.Identity(), nn.Linear(8, 3)

    def product(self, x):
        return F.linear(x, self.block.b.weight, self.block.b.bias)

    def forward(self, x):
        return self.out(torch.tanh(self.other(torch.tanh(self.block(x)))))


WAYS = [
    *(of_the_instance, a_lambda, a_partial, a_hook, a_hook_object, a_hook_module, a_hook_with_keywords),
    *(a_hook_before, a_hook_of_the_block),
    *(the_call, the_call_of_a_linear, a_sibling_in_a_list, a_method_of_the_parent),
]


def build(change):
    torch.manual_seed(0)
    model = Model()
    change(model)
    return model.eval(), torch.randn(5, 8)


def merged(change, model, x):
    """What a model with W + vector 1ᵀ in the place of W gives: of its class anew, as copies share bound functions."""
    whole = build(change)[0].double()
    with torch.no_grad():
        for name, vector in onelora.vectors(model).items():
            whole.get_submodule(name).weight += vector.double()[:, None]
    return whole(x.double())


@pytest.mark.parametrize("change", WAYS)
def test_is_adapted_on_every_way(change):
    model, x = build(change)
    base = model(x)
    onelora.adapt(model)
    assert set(onelora.vectors(model)) == {"block.b", "out"}
    assert torch.equal(model(x), base)
    fill_vectors(model, 0.5)
    expected = merged(change, model, x)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    fast = torch.compile(model, backend="onelora", options={"inner": "eager"})
    torch.testing.assert_close(fast(x).double(), expected, rtol=1e-5, atol=1e-5)
    onelora.merge(model)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", WAYS)
def test_one_line_gives_the_same_vectors(change):
    model, x = build(change)
    base = model(x)
    fast = torch.compile(model, backend="onelora", options={"inner": "eager"})
    with pytest.warns(onelora.OneLoRAWarning, match="adapted 2 linears"):
        torch.testing.assert_close(fast(x), base)
    fill_vectors(model, 0.5)
    torch.testing.assert_close(fast(x).double(), merged(change, model, x), rtol=1e-5, atol=1e-5)


PAST = {
    "a_list": (lambda s: [s.b.weight], lambda held, x: F.linear(x, held[0])),
    "computed_from_a_list": (lambda s: [s.b.weight], lambda held, x: F.linear(x, held[0] * 2)),
    "a_partial": (lambda s: functools.partial(F.linear, weight=s.b.weight), lambda held, x: held(x)),
    "a_closure": (lambda s: lambda x, w=s.b.weight: F.linear(x, w), lambda held, x: held(x)),
    "its_memory": (lambda s: (s.b.weight.detach(),), lambda held, x: F.linear(x, held[0])),
    "an_object": (lambda s: types.SimpleNamespace(w=s.b.weight), lambda held, x: F.linear(x, held.w)),
}


@pytest.mark.parametrize("name", PAST)
def test_a_weight_that_is_held_elsewhere_is_named(name):
    hold, use = PAST[name]

    class Holding(Block):
        def __init__(self):
            super().__init__()
            self.a, self.held = nn.Linear(8, 8), hold(self)

        def forward(self, x):
            return use(self.held, torch.tanh(self.a(x))) + self.b(x)

    model, x = Holding(), torch.randn(5, 8)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["a"]
    assert "out of a dictionary or a list" in onelora.summary(model).skipped["b"]
    fill_vectors(model, 0.5)
    torch.testing.assert_close(merged_copy(model)(x), model(x))


WRITES = {
    "in_place": lambda s: s.b.weight.mul_(0.9),
    "a_copy": lambda s: s.b.weight.copy_(F.normalize(s.b.weight)),
    "an_item": lambda s: s.b.weight.__setitem__(0, 0.0),
    "its_data": lambda s: setattr(s.b.weight, "data", s.b.weight.data.clamp(-0.1, 0.1)),
}


class Writing(Block):
    def __init__(self, write):
        super().__init__()
        self.a, self.write = nn.Linear(8, 8), write

    def forward(self, x):
        with torch.no_grad():
            self.write(self)
        return self.b(torch.tanh(self.a(x)))


class Limited(nn.Linear):
    """A linear that limits its weight before each use, as EEGNet's."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


@pytest.mark.parametrize("name", [*WRITES, "limited"])
def test_a_weight_that_the_forward_writes_to_is_left_out_and_named(name):
    def made():
        torch.manual_seed(0)
        if name == "limited":
            return nn.ModuleDict({"a": nn.Linear(8, 8), "b": Limited(8, 8)}), lambda model, x: model["b"](model["a"](x))
        return Writing(WRITES[name]), lambda model, x: model(x)

    (base, run), (model, _), x = made(), made(), torch.randn(5, 8)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["a"]
    assert "written to by the forward" in onelora.summary(model).skipped["b"]
    for _ in range(2):
        assert torch.equal(run(model, x), run(base, x))
    assert torch.equal(model.state_dict()["b.weight"], base.state_dict()["b.weight"])


def changed(module, name, value):
    for parameter in module.parameters():
        setattr(parameter, name, value)


PENALTIES = {
    "parameters": lambda s, y: y + 1e-3 * sum(p.pow(2).sum() for p in s.parameters()),
    "state": lambda s, y: y * len(s.state_dict()),
    "frozen": lambda s, y: (changed(s.b, "requires_grad", False), y)[1],
    "gradients": lambda s, y: (changed(s, "grad", None), y)[1],
}


@pytest.mark.parametrize("name", PENALTIES)
def test_what_is_done_to_all_parameters_leaves_no_linear_out(name):
    class Penalised(Block):
        def forward(self, x):
            return PENALTIES[name](self, super().forward(x))

    model = onelora.adapt(nn.Sequential(Penalised(), nn.Linear(8, 3)))
    assert list(onelora.vectors(model)) == ["0.b", "1"]
    model(torch.randn(2, 8))


def test_a_program_that_leaves_its_forward_is_adapted():
    class Leaves(Block):
        def forward(self, x):
            if x.mean() > 1e9:
                sys.exit("no")
            return F.linear(x, self.b.weight)

    assert list(onelora.vectors(onelora.adapt(Leaves()))) == ["b"]


def test_a_scripted_child_is_named_and_the_rest_adapted():
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.script"):
        model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())))
    base = model(x := torch.randn(2, 8))
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["0"]
    assert "torch.jit.script" in onelora.summary(model).skipped["1.0"]
    assert torch.equal(model(x), base)


def test_code_that_nothing_can_follow_is_named_and_what_it_may_read_adapted():
    class Opaque(Block):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            {x.shape: 0}[torch.Size([*x.shape])]  # a KeyError without values
            return F.linear(self.a(x), self.b.weight) @ self.w

    model, x = Opaque(), torch.randn(5, 8)
    fill_vectors(onelora.adapt(model), 0.5)
    assert set(onelora.vectors(model)) == {"a", "b"}
    assert "can't be followed without values (KeyError" in onelora.summary(model).skipped["w"]
    torch.testing.assert_close(merged_copy(model)(x), model(x))
