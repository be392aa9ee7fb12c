"""Weights that can't be handed out adapted, for how the code holds or changes them: left out, and named."""

import functools
import sys
import types

import pytest
import torch
from blocks import Block
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

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


@pytest.mark.parametrize("script", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 8))])
def test_a_scripted_model_is_refused_by_name(script):
    model = script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    with pytest.raises(onelora.TargetError, match=r"torch\.jit\.script, whose code nothing can be added to: 0"):
        onelora.adapt(model)
    assert onelora.vectors(model) == {}


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


def test_rows_that_only_a_call_picks_are_named_with_the_way_to_adapt_them():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.a = nn.Parameter(torch.randn(24, 8)), nn.Linear(8, 8)

        def forward(self, x, rows):
            return F.linear(self.a(x), self.w.index_select(0, rows))

    torch.manual_seed(0)
    model, x, rows = Picks(), torch.randn(5, 8), torch.tensor([3, 1, 20])
    left = onelora.summary(onelora.adapt(model)).skipped["w"]
    assert "mixes its axes" in left
    assert "in target_parameters" in left
    fill_vectors(onelora.adapt(onelora.detach(model), onelora.OneLoRAConfig(target_parameters={"w": 1})), 0.5)
    exact, plain = (merged_copy(model, dtype)(x.to(dtype), rows) for dtype in (torch.float64, torch.float32))
    run = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    for found in (model(x, rows), run(x, rows)):
        assert_parity(found, exact, plain)
