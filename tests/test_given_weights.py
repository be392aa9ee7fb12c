"""Modules that are called with other weights in the place of their own: left out by name, so every path agrees."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.exporters.onnx_runtime.runner import OnnxRunner
from onelora_compile.testing import fill_vectors, merged_copy

call = functional_call  # by another name


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.c = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.register_buffer("w", torch.randn(8, 8) / 3)


def ensemble(s, x):
    parameters, _ = torch.func.stack_module_state([s.a, s.b])
    return torch.vmap(lambda one, x: functional_call(s.a, one, (x,)), (0, None))(parameters, s.c(x)).sum(0)


def stacked(s, x):
    both = torch.stack([s.a.weight, s.b.weight])
    return torch.vmap(lambda one: functional_call(s.a, {"weight": one}, x))(both).sum(0) + s.c(x)


# What is called, and the linears that have a vector then.
FORWARDS = {
    "another's": (
        lambda s, x: functional_call(s.a, {"weight": s.b.weight, "bias": s.b.bias}, (s.b(x),)) + s.a(x) + s.c(x),
        {"b", "c.0", "c.2"},
    ),
    "another's, unadapted": (
        lambda s, x: functional_call(s.a, dict(s.b.named_parameters()), (s.c(x),)),
        {"c.0", "c.2"},
    ),
    "its own": (
        lambda s, x: functional_call(s.a, dict(s.a.named_parameters()), (s.b(x).tanh(),)) + s.c(x),
        {"a", "b", "c.0", "c.2"},
    ),
    "its own, scaled": (
        lambda s, x: functional_call(s.a, {k: 2 * v for k, v in s.a.named_parameters()}, s.b(x).tanh()) + s.c(x),
        {"b", "c.0", "c.2"},
    ),
    "a buffer": (lambda s, x: functional_call(s.a, {"weight": s.w}, s.c(x)) + s.b(x), {"b", "c.0", "c.2"}),
    "one of a block": (lambda s, x: functional_call(s.c, {"0.weight": s.w}, s.b(x).tanh()) + s.a(x), {"a", "b", "c.2"}),
    "by another name": (lambda s, x: call(s.c, {"0.weight": s.w}, s.b(x).tanh()) + s.a(x), {"a", "b", "c.2"}),
    "a step": (
        lambda s, x: (
            functional_call(s.c, {k: p - 0.1 * p.sign() for k, p in s.c.named_parameters()}, (s.a(x),)) + s.b(x)
        ),
        {"a", "b"},
    ),
    "made of values": (
        lambda s, x: functional_call(s.a, {"weight": torch.outer(s.b(x).mean(0), s.b(x).mean(0))}, x) + s.c(x),
        {"b", "c.0", "c.2"},
    ),
    "a bias": (
        lambda s, x: functional_call(s.a, {"bias": s.b.bias}, (s.b(x).tanh(),)) + s.c(x),
        {"a", "b", "c.0", "c.2"},
    ),
    "ensemble": (ensemble, {"c.0", "c.2"}),
    "stacked": (stacked, {"b", "c.0", "c.2"}),
}

GIVEN_THE_BUFFER = {"a buffer", "one of a block", "by another name"}  # which the summary names too


@pytest.mark.parametrize("name", FORWARDS)
def test_what_is_called_with_another_weight_is_left_out_on_every_path(name, tmp_path):
    forward, expected = FORWARDS[name]
    kind = type("Model", (Model,), {"forward": forward})
    torch.manual_seed(0)
    base, x = kind().eval(), torch.randn(5, 8)
    model = onelora.adapt(copy.deepcopy(base))
    assert set(onelora.vectors(model)) == expected
    buffer = {"w"} if name in GIVEN_THE_BUFFER else set()
    assert set(onelora.summary(model).skipped) == ({"a", "b", "c.0", "c.2"} - expected) | buffer
    fill_vectors(model)
    with torch.no_grad():
        merged = merged_copy(model).double()(x.double())
        assert not torch.allclose(merged, base.double()(x.double()), rtol=1e-3)
        torch.testing.assert_close(model(x).double(), merged, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(model, backend="onelora", options={"inner": "eager"})
        torch.testing.assert_close(compiled(x).double(), merged, rtol=1e-5, atol=1e-5)
        export_onnx(model, (x,), tmp_path / "exported.onnx", adapters="fold")
        check(tmp_path / "exported.onnx", x, merged)
        onelora.save_adapter(model, tmp_path / "a.safetensors")
        torch.onnx.export(base.float(), (x,), tmp_path / "base.onnx", dynamo=True, verbose=False)
    fold = functools.partial(fold_onnx, tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "folded.onnx")
    if name == "stacked":  # the exporter stacks the numbers, so that no weight of the file is the base's
        with pytest.raises(ExportError, match=r"have no place in .*: b: no weight is its base's"):
            fold()
        return
    fold()
    check(tmp_path / "folded.onnx", x, merged)


def check(path, x, expected):
    out = torch.from_numpy(OnnxRunner(path).run([x.numpy()])[0])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_linear_that_lends_its_weight_to_an_embedding_and_is_never_called_is_left_out():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return F.linear(self.inner(self.table(tokens)).tanh(), self.table.weight)

    model = onelora.adapt(Tied())
    assert set(onelora.vectors(model)) == {"inner"}
    assert "embedding" in onelora.summary(model).skipped["head"]


def in_a_list(s, x):
    s.c[2].weight = s.c[0].weight
    return s.c(x) + s.a(x)


def by_attribute(s, x):
    s.b.weight = s.a.weight
    return s.b(s.a(x).tanh()) + s.c(x)


@pytest.mark.parametrize(("forward", "expected"), [(in_a_list, {"a", "b"}), (by_attribute, {"c.0", "c.2"})])
def test_a_weight_that_the_forward_gives_to_another_module_is_left_out(forward, expected):
    torch.manual_seed(0)
    model, x = type("Model", (Model,), {"forward": forward})().eval(), torch.randn(5, 8)
    before = model(x)
    onelora.adapt(model)
    assert set(onelora.vectors(model)) == expected
    torch.testing.assert_close(model(x), before)
    fill_vectors(model)
    torch.testing.assert_close(model(x), merged_copy(model)(x))
