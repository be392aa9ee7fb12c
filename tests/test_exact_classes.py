"""Code that goes by the exact class of a layer: adapted layers are of a subclass, so that adapt has to say it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from zoo import MODELS

import onelora_compile as onelora
from onelora_compile.errors import OneLoRAWarning

TABLE = {nn.Linear: 2, nn.ReLU: 3}
NAMED = {"Linear": 2}


class Model(nn.Module):
    factor: Any  # of the forms below

    def __init__(self):
        super().__init__()
        self.a, self.table = nn.Linear(8, 8), {nn.Linear: 2}

    def forward(self, x):
        return self.a(x) * self.factor(self.a)


class Own(nn.Module):
    """Reads its weight itself, so that its own class changes."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return nn.functional.linear(x, self.w) * (2 if type(self) is Own else 1)


def _assigned(self, layer):
    kind = type(layer)
    return 2 if kind is nn.Linear else 1


def _matched(self, layer):
    match type(layer):
        case nn.Linear:
            return 2
        case _:
            return 1


def _looped(self, layer):
    return sum(type(one) == nn.Linear for one in [layer])  # noqa: E721 (as users write it)


EXACT = {
    "is": lambda self, layer: 2 if type(layer) is nn.Linear else 1,
    "is_not": lambda self, layer: 1 if layer.__class__ is not nn.Linear else 2,
    "in": lambda self, layer: 2 if type(layer) in (nn.Linear, nn.Conv1d) else 1,
    "name": lambda self, layer: 2 if layer.__class__.__name__ == "Linear" else 1,
    "literal": lambda self, layer: {nn.Linear: 2}.get(type(layer), 1),
    "table": lambda self, layer: TABLE[type(layer)] if type(layer) in TABLE else 1,
    "named_table": lambda self, layer: NAMED.get(type(layer).__name__, 1),
    "of_self": lambda self, layer: self.table.get(type(layer), 1),
    "assigned": _assigned,
    "matched": _matched,
    "looped": _looped,
}
FINE = {
    "isinstance": lambda self, layer: 2 if isinstance(layer, nn.Linear) and type(self.table) is dict else 1,
    "another_class": lambda self, layer: 2 if type(layer) is nn.Conv1d else 1,
    "a_text": lambda self, layer: len(f"{type(layer).__name__} of {self.__class__.__name__}") // 100 + 1,
    "a_subclass": lambda self, layer: 2 if issubclass(type(layer), nn.Linear) else 1,
}


def _warned(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(one.message) for one in caught if issubclass(one.category, OneLoRAWarning)]


@pytest.mark.parametrize("form", EXACT)
def test_code_that_goes_by_the_exact_class_is_named_with_its_line(form):
    model = type("Form", (Model,), {"factor": EXACT[form]})()
    (message,) = _warned(lambda: onelora.adapt(model))
    line = EXACT[form].__code__.co_firstlineno
    assert any(f"{__file__}:{line + more}: " in message for more in range(3)), message
    assert "exact class Linear" in message
    assert "isinstance(module, Linear)" in message


def test_a_module_that_asks_for_its_own_class_is_named():
    (message,) = _warned(lambda: onelora.adapt(Own()))
    assert "exact class Own" in message


def test_the_first_compiled_call_says_so_too():
    model = type("Form", (Model,), {"factor": EXACT["is"]})()
    compiled = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    assert any("exact class Linear" in message for message in _warned(lambda: compiled(torch.randn(2, 8))))


def test_one_more_adapter_on_more_layers_says_so_too():
    model = type("Form", (Model,), {"factor": EXACT["is"]})()
    model.c = type("Other", (nn.Linear,), {})(8, 8)
    onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["c"]))
    (message,) = _warned(lambda: onelora.add_adapter(model, "b", onelora.OneLoRAConfig(target_modules=["a"])))
    assert "exact class Linear" in message


@pytest.mark.parametrize("form", FINE)
def test_other_questions_are_none_and_zero_vectors_are_the_base(form):
    model, x = type("Form", (Model,), {"factor": FINE[form]})(), torch.randn(2, 8)
    before = model(x)
    assert _warned(lambda: onelora.adapt(model)) == []
    torch.testing.assert_close(model(x), before)


def test_layers_that_are_left_out_keep_their_class():
    model = type("Form", (Model,), {"factor": EXACT["is"]})()
    model.c = type("Other", (nn.Linear,), {})(8, 8)
    assert _warned(lambda: onelora.adapt(model, onelora.OneLoRAConfig(exclude_modules=["a"]))) == []


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_models_are_free_of_it(name):
    model, _ = MODELS[name]()
    assert not any("exact class" in message for message in _warned(lambda: onelora.adapt(model)))
