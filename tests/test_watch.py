"""Vectors that learn nothing are named after the first backward, once."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.adapting import dead_vectors
from onelora_compile.testing import perturb_norms


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.c(torch.relu(self.b(self.norm(self.a(x)))))


def first_backward(run, x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run(x).square().sum().backward()
    return [str(w.message) for w in caught if issubclass(w.category, onelora.OneLoRAWarning)]


def eager(model):
    return model


def fast(model):
    return torch.compile(model, backend="onelora", options={"inner": "aot_eager"})


@pytest.mark.parametrize("how", [eager, fast])
def test_a_fresh_layer_norm_makes_the_next_vector_a_bias(how):
    model = onelora.adapt(Normed())
    (message,) = first_backward(how(model), torch.randn(5, 8))
    assert "constant bias" in message
    assert "sums to the same number: b (a LayerNorm" in message
    assert "train_norms=True" in message
    assert "exact zeros" not in message


@pytest.mark.parametrize("how", [eager, fast])
def test_nothing_is_said_where_all_is_well(how):
    for model in (perturb_norms(onelora.adapt(Normed())), onelora.adapt(zoo.MLP())):
        assert first_backward(how(model), torch.randn(5, 8)) == []


@pytest.mark.parametrize("how", [eager, fast])
def test_trained_norms_are_the_remedy(how):
    model = onelora.adapt(Normed(), onelora.OneLoRAConfig(train_norms=True))
    assert first_backward(how(model), torch.randn(5, 8)) == []


@pytest.mark.parametrize("how", [eager, fast])
def test_no_gradient_and_zero_gradients_are_told_apart(how):
    class Dead(zoo.MLP):
        extra: nn.Module

        def forward(self, x):
            h = torch.relu(self.a(x))
            with torch.no_grad():
                self.c(h)
            return self.b(h) + self.extra(torch.relu(h)) * 0.0

    model = Dead()
    model.extra = nn.Linear(6, 7)
    onelora.adapt(model)
    (message,) = first_backward(how(model), torch.randn(5, 8))
    assert "no gradient at all: c (" in message
    assert "exact zeros: extra (" in message


def test_copies_and_pickles_are_free_of_it():
    model = onelora.adapt(Normed())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert first_backward(twin, torch.randn(5, 8)) == []
    assert len(first_backward(model, torch.randn(5, 8))) == 1


def test_a_check_that_is_over_costs_no_compilation_and_keeps_nothing():
    from counted_graphs import Counter

    model = onelora.adapt(zoo.MLP())
    counter = Counter()
    compiled = torch.compile(model, backend="onelora", options={"inner": counter})
    x = torch.randn(5, 8)
    for _ in range(4):
        compiled(x).sum().backward()
    model(x).sum().backward()
    assert len(counter.graphs) == 1
    assert not any(module in dead_vectors._watched for module in model.modules())
    assert not any(vector._post_accumulate_grad_hooks for vector in onelora.vectors(model).values())


@pytest.mark.parametrize("seen", ["adapted", "called", "trained", "disabled", "named"])
def test_a_conversion_that_swaps_tensors_finds_no_weak_reference(seen):
    model, x = onelora.adapt(Normed()), torch.randn(5, 8)
    if seen == "called":
        model(x)
    if seen == "trained":
        assert len(first_backward(model, x)) == 1
    if seen == "disabled":
        with onelora.disabled(model):
            model(x)
    if seen == "named":
        onelora.add_adapter(model, "b")
        onelora.set_adapter(model, "b")
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert {vector.dtype for vector in onelora.vectors(model).values()} == {torch.float64}
    assert first_backward(model, x.double()) == []  # hooks go with the old tensors, as any user's do


def test_a_model_that_is_never_trained_is_not_looked_at_for_ever():
    model, x = onelora.adapt(zoo.MLP()), torch.randn(5, 8)
    for _ in range(100):
        model(x)
    seen = dict(dead_vectors._watched)
    model(x)
    assert all(dead_vectors._watched[module] is seen[module] for module in model.modules() if module in seen)


def test_one_row_is_not_taken_for_a_constant():
    assert first_backward(onelora.adapt(zoo.MLP()), torch.randn(1, 8)) == []


POLICIES = {
    "nothing kept": [],
    "matmuls kept": [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default],
}


@pytest.mark.parametrize("kept", POLICIES)
def test_selective_checkpointing_meets_the_same_operators_again(kept):
    """It records what runs in the forward, and refuses another operator when the forward runs again."""
    from torch.utils import checkpoint

    model, x = onelora.adapt(zoo.MLP()), torch.randn(5, 8)
    plain = copy.deepcopy(model)
    contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, POLICIES[kept])
    segment = functools.partial(checkpoint.checkpoint, model, use_reentrant=False, context_fn=contexts)
    assert first_backward(segment, x) == []
    first_backward(plain, x)
    for name, vector in onelora.vectors(plain).items():
        assert vector.grad is not None
        assert vector.grad.any()
        torch.testing.assert_close(onelora.vectors(model)[name].grad, vector.grad)


def test_experts_that_no_token_chose_are_not_dead():
    from forms import build

    model, x, _ = build("experts_by_index")
    onelora.adapt(model)
    assert first_backward(model, x[:1]) == []


class Segment(torch.autograd.Function):
    """Recomputes a part of the model in its backward, as reversible layers do."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.save_for_backward(x)
        ctx.module = module
        return module(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), gradient)
        return x.grad, None


def segments(model):
    return lambda x: Segment.apply(Segment.apply(model.a(x), model.b), model.c)


@pytest.mark.parametrize("run", [eager, segments])
def test_gradients_of_the_inputs_alone_say_nothing_of_vectors(run):
    model, x = perturb_norms(onelora.adapt(Normed())), torch.randn(5, 8, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(run(model)(x).square().sum(), x)
        run(model)(x).square().sum().backward()


def test_a_backward_to_some_inputs_leaves_the_verdict_to_the_next():
    model, x = onelora.adapt(Normed()), torch.randn(5, 8, requires_grad=True)
    vectors = onelora.vectors(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).square().sum().backward(inputs=[vectors["c"]])
        model(x).square().sum().backward(inputs=vectors["a"])
        model(x).square().sum().backward(inputs=[x])
    with pytest.warns(onelora.OneLoRAWarning, match="no more than a constant bias"):
        model(x).square().sum().backward(inputs=list(vectors.values()))
    one = onelora.adapt(nn.Sequential(nn.Linear(8, 3)))
    with pytest.warns(onelora.OneLoRAWarning, match="exact zeros"):
        (one(x) * 0).sum().backward(inputs=onelora.vectors(one)["0"])


def test_a_part_of_a_norm_s_output_is_no_constant_input():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.norm(x).view(-1, 2, 4))

    assert first_backward(fast(onelora.adapt(Heads())), torch.randn(5, 8)) == []
