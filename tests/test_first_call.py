"""The first call of a compiled model that nobody adapted: models whose graph is hard to adapt, and for whom a graph is
valid.  What must hold for all of them is `paths.check_model`."""

import copy
import gc
import pickle

import paths
import pytest
import torch
import zoo
from hard_models import AS_IT_IS, HARD, Default, Scaled, Shared
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy, perturb_norms


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", HARD)
def test_the_first_call_of(name, train, grad):
    make, inputs, way = HARD[name]
    torch.manual_seed(0)
    as_it_is = paths.check_model(make().train(train), inputs(), grad, scale=0.3)
    if grad:
        assert as_it_is == (way == AS_IT_IS)


def test_a_module_that_is_adapted_by_its_output():
    model = nn.Sequential(Scaled(8, 8), Default(8, 3))
    base = copy.deepcopy(model)
    fast, graphs = paths.compiled(model)
    x = torch.randn(5, 8)
    out, (message,) = paths.first_call(lambda: fast(x))
    assert torch.equal(out, base(x))
    assert "0: Scaled is adapted by its output" in message
    fill_vectors(model, 0.5)
    first, second = onelora.vectors(model).values()
    hidden = base[0](x) + x.sum(-1, keepdim=True) * first
    expected = base[1](hidden) + hidden.sum(-1, keepdim=True) * second
    torch.testing.assert_close(fast(x), expected)
    torch.testing.assert_close(model(x), expected)
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_as_it_is_says_so_and_the_first_backward_does_not_fail(frozen):
    model = Shared()
    if frozen:
        model.requires_grad_(False)
    fast, _ = paths.compiled(model)
    x = torch.randn(2, 8, requires_grad=True)
    out, (message,) = paths.first_call(lambda: fast(x))
    assert "run as it is" in message
    assert "the weight is shared" in message
    out.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapted_model_runs_through_a_frame_it_shares_with_a_fresh_one():
    """Graph breaks: parts without a linear are captured too, and their graphs are of the base and the adapted model."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.norm(x)
            torch._dynamo.graph_break()
            return self.fc(x)

    model = perturb_norms(nn.Sequential(Part(), Part()))
    paths.check_model(model, {"input": torch.randn(3, 8)}, True, scale=0.3)


@pytest.mark.parametrize("kept", [True, False], ids=["alive", "dead"])
def test_twenty_models_of_a_class_share_their_graphs(kept):
    graphs, models = paths.Graphs(), []
    x = torch.randn(5, 8)
    for seed in range(20):
        model = zoo.MLP()
        base = model(x)
        fast = torch.compile(model, backend="onelora", fullgraph=True, options={"inner": graphs})
        out, messages = paths.first_call(lambda fast=fast: fast(x))
        assert torch.equal(out, base)
        assert len(messages) == 1
        fill_vectors(model, 0.5, seed)
        torch.testing.assert_close(fast(x), merged_copy(model)(x))
        models += [(model, fast)] if kept else []
        del model, fast
        if not kept:
            gc.collect()
    assert len(graphs.graphs) == 1
    for model, fast in models:  # each with its own vectors
        torch.testing.assert_close(fast(x), merged_copy(model)(x))


@pytest.mark.parametrize("how", ["detach", "merge"])
@pytest.mark.parametrize("compiled_by", ["model", "step"])
def test_a_fresh_model_is_adapted_after_another_of_its_class_was_detached(how, compiled_by):
    graphs, x = paths.Graphs(), torch.randn(5, 8)

    def compiled(model):
        if compiled_by == "model":
            return torch.compile(model, backend="onelora", options={"inner": graphs})
        return torch.compile(step, backend="onelora", options={"inner": graphs})

    def step(x):
        return model(x) * 2

    model = zoo.MLP()
    fill_vectors(onelora.adapt(model), 0.5)
    getattr(onelora, how)(model)
    out, messages = paths.first_call(lambda: compiled(model)(x))
    assert messages == []
    torch.testing.assert_close(out, model(x) if compiled_by == "model" else model(x) * 2)
    model = zoo.MLP()
    _, messages = paths.first_call(lambda: compiled(model)(x))
    assert len(messages) == 1
    assert len(onelora.vectors(model)) == 3


@pytest.mark.parametrize("how", ["detach", "merge"])
def test_copies_and_pickles_of_a_model_without_its_vectors_are_plain_and_not_adapted_again(how):
    model, names = zoo.MLP(), set(vars(zoo.MLP()))
    getattr(onelora, how)(fill_vectors(onelora.adapt(model), 0.5))
    written, x = pickle.dumps(model), torch.randn(5, 8)
    assert b"onelora_compile" not in written  # it is read where this package is not installed
    for one in (copy.deepcopy(model), pickle.loads(written)):
        assert set(vars(one)) - names == {"_onelora_state"}
        out, messages = paths.first_call(lambda one=one: paths.compiled(one)[0](x))
        assert messages == []
        assert torch.equal(out, model(x))
        assert len(onelora.vectors(onelora.adapt(one))) == 3


def test_a_refused_file_leaves_a_model_that_its_first_call_adapts(tmp_path):
    other = fill_vectors(onelora.adapt(zoo.MLP()))
    onelora.save_adapter(other, tmp_path / "a.safetensors")
    model = zoo.MLP()
    with torch.no_grad():
        model.a.weight += 1
    with pytest.raises(onelora.BaseMismatchError):
        onelora.load_adapter(model, tmp_path / "a.safetensors")
    fast, _ = paths.compiled(model)
    _, messages = paths.first_call(lambda: fast(torch.randn(5, 8)))
    assert len(messages) == 1
    assert len(onelora.vectors(model)) == 3
    onelora.detach(model)  # on purpose: a refused file does not undo that
    with pytest.raises(onelora.BaseMismatchError):
        onelora.load_adapter(model, tmp_path / "a.safetensors")
    paths.first_call(lambda: fast(torch.randn(5, 8)))
    assert onelora.vectors(model) == {}


def test_a_first_call_that_fails_leaves_the_model_as_it_was():
    class Fails(zoo.MLP):
        def forward(self, x):
            y = super().forward(x)
            torch._assert_async((x >= 0).all(), "negative")
            return y

    model = Fails()
    state = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    fast, _ = paths.compiled(model)
    with pytest.raises(RuntimeError, match="negative"):
        fast(-torch.ones(5, 8))
    assert onelora.vectors(model) == {}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == state
    assert type(model.a) is nn.Linear
    x = torch.ones(5, 8)
    _, messages = paths.first_call(lambda: fast(x))
    assert len(messages) == 1
    fill_vectors(model, 0.5)
    torch.testing.assert_close(fast(x), merged_copy(model)(x))
    copy.deepcopy(model)


def test_two_models_in_one_step_have_their_own_vectors():
    first, second = zoo.MLP(), zoo.MLP()

    def step(x):
        return first(x) + second(x) ** 2

    x = torch.randn(5, 8)
    graphs = paths.Graphs()
    fast = torch.compile(step, backend="onelora", options={"inner": graphs})
    expected = step(x)
    out, messages = paths.first_call(lambda: fast(x))
    assert len(messages) == 2
    assert torch.equal(out, expected)
    out.sum().backward()
    for model, seed in ((first, 1), (second, 2)):
        assert all(vector.grad is not None and vector.grad.any() for vector in onelora.vectors(model).values())
        fill_vectors(model, 0.5, seed)
    torch.testing.assert_close(fast(x), merged_copy(first)(x) + merged_copy(second)(x) ** 2)
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_model_inside_data_parallel(grad):
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    base, x = copy.deepcopy(model), torch.randn(5, 8)
    wrapped = nn.DataParallel(model)
    fast = torch.compile(wrapped, backend="onelora", options={"inner": "aot_eager"})
    with torch.set_grad_enabled(grad):
        out, (message,) = paths.first_call(lambda: fast(x))
    assert "adapted 2 linears of Sequential" in message
    torch.testing.assert_close(out, base(x))
    if grad:
        out.sum().backward()
        assert all(vector.grad is not None for vector in onelora.vectors(wrapped).values())
    assert list(onelora.vectors(wrapped)) == list(onelora.vectors(model)) == ["0", "2"]
    fill_vectors(model, 0.5)
    torch.testing.assert_close(fast(x), merged_copy(model)(x))
