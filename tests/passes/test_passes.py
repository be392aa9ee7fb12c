"""Each pass on small graphs: what it rewrites, what it leaves alone and why, and that twice is once."""

import pytest
import torch
from siblings import VECTORS, Siblings, captured, inserted, traced
from torch import fx, nn

import onelora_compile as onelora
from onelora_compile.ops import ADD_RANK1, FEATURE_SUM, RANK1_UPDATE
from onelora_compile.passes import (
    PIPELINE,
    fuse_rank1,
    insert_rank1,
    match_linear,
    run_passes,
    share_feature_sum,
    verify,
)
from onelora_compile.passes.graph.writes import mutates
from onelora_compile.passes.invariants import vectors_of
from onelora_compile.passes.lowerings.producer_consumer import ADD_RANK1_BY_MATMUL


def count(gm, target):
    return sum(node.target is target for node in gm.graph.nodes)


def adapted_reference(model, x):
    """(W + b 1ᵀ) x + c for each linear, without any operator of the project."""
    twin = Siblings()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, vector in VECTORS.items():
            twin.get_parameter(f"{name}.weight").add_(vector[:, None])
    return twin(x)


def test_match_calls_of_modules():
    sites = match_linear(traced())
    assert [site.kind for site in sites] == ["module"] * 3
    assert [site.module for site in sites] == ["q", "k", "o"]
    assert [(site.in_features, site.out_features) for site in sites] == [(4, 3), (4, 3), (3, 2)]
    assert all(site.update is None and site.weight is None for site in sites)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        y = nn.functional.linear(x, self.w)
        return torch.mm(y, self.v) + y @ (y.transpose(0, 1) @ y)[:, :2]


@pytest.mark.parametrize("how", ["symbolic_trace", "dynamo", "export"])
def test_match_functional_forms_and_not_products_of_activations(how):
    model, x = Functional(), torch.randn(5, 4)
    if how == "symbolic_trace":
        gm = traced(model)
    elif how == "dynamo":
        gm = captured(model, x)
    else:
        gm = torch.export.export(model, (x,)).graph_module
    sites = match_linear(gm)
    assert [(site.kind, site.axes) for site in sites] == [("linear", (-1,)), ("matmul", (-2,))]
    if how != "symbolic_trace":
        assert [(site.in_features, site.out_features) for site in sites] == [(4, 3), (3, 2)]
        assert "linear(x, self.w)" in sites[0].source


@pytest.mark.parametrize("how", ["dynamo", "export"])
def test_match_finds_the_update_through_the_views_of_conv1d(how):
    from transformers.pytorch_utils import Conv1D

    model = onelora.adapt(nn.Sequential(Conv1D(6, 4)))
    x = torch.randn(2, 3, 4)
    gm = captured(model, x) if how == "dynamo" else torch.export.export(model, (x,)).graph_module
    (site,) = match_linear(gm)
    assert site.axes == (-2,)
    assert site.update is not None
    assert site.vector is not None
    assert (site.module, site.in_features, site.out_features) == ("0", 4, 6)


def test_insert_adds_inputs_in_order_and_computes_the_merged_weights():
    model = Siblings()
    gm, result, inputs = inserted(model)
    assert inputs == ["q", "k", "o"] == result.rewrites
    assert result.modified
    assert count(gm, RANK1_UPDATE) == 3
    x = torch.randn(5, 4)
    torch.testing.assert_close(gm(x, *(VECTORS[name] for name in inputs)), adapted_reference(model, x))


def test_insert_leaves_alone_and_says_why():
    gm, result, _ = inserted(vectors={"q": VECTORS["q"]})
    assert result.skips == {"k": "no vector of this name was given", "o": "no vector of this name was given"}
    again, inputs = insert_rank1(gm, VECTORS)
    assert again.skips == {"q": "adapted already"}
    assert inputs == ["k", "o"]
    third, _ = insert_rank1(gm, VECTORS)
    assert not third.modified


def test_insert_gives_a_module_that_is_called_twice_one_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.fc(x))

    gm, result, inputs = inserted(Twice(), {"fc": torch.ones(3)})
    assert inputs == ["fc"]
    assert result.rewrites == ["fc", "fc"]
    assert len(vectors_of(gm)) == 1


def test_share_takes_one_sum_per_input():
    model = Siblings()
    gm, _, inputs = inserted(model)
    result = share_feature_sum(gm)
    gm.recompile()
    assert len(result.rewrites) == 3
    assert (count(gm, FEATURE_SUM), count(gm, ADD_RANK1), count(gm, RANK1_UPDATE)) == (2, 3, 0)
    x = torch.randn(5, 4)
    torch.testing.assert_close(gm(x, *(VECTORS[name] for name in inputs)), adapted_reference(model, x))
    assert not share_feature_sum(gm).modified


class InPlace(Siblings):
    def forward(self, x):
        q = self.q(x)
        x.add_(1.0)
        return self.o(q * self.k(x))


def test_share_does_not_cross_a_write():
    model = InPlace()
    gm, _, inputs = inserted(model)
    share_feature_sum(gm)
    gm.recompile()
    assert count(gm, FEATURE_SUM) == 3
    x = torch.randn(5, 4)
    twin = InPlace()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, vector in VECTORS.items():
            twin.get_parameter(f"{name}.weight").add_(vector[:, None])
        expected = twin(x.clone())
        actual = gm(x.clone(), *(VECTORS[name] for name in inputs))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: x.add_(1), True),
        (lambda x: torch.relu_(x), True),
        (lambda x: nn.functional.relu(x, inplace=True), True),
        (lambda x: nn.functional.relu(x, True), True),
        (lambda x: torch.add(x, 1, out=x), True),
        (lambda x: x.__setitem__(0, 1.0), True),
        (lambda x: torch.ops.aten.add_.Tensor(x, 1), True),
        (lambda x: x.add(1), False),
        (lambda x: torch.relu(x), False),
        (lambda x: torch.ops.aten.add.Tensor(x, 1), False),
        (lambda x: nn.functional.layer_norm(x, (4,)), False),
        (lambda x: x + 1, False),
    ],
)
def test_what_counts_as_a_write(call, expected):
    gm = fx.symbolic_trace(lambda x: (call(x), x)[1])
    assert any(mutates(gm, node) for node in gm.graph.nodes) is expected


def test_inplace_operator_and_module_count_as_writes():
    def augmented(x):
        x += 1
        return x

    gm = captured(augmented, torch.randn(3))
    assert any(mutates(gm, node) for node in gm.graph.nodes)
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU(inplace=True)))
    assert any(mutates(gm, node) for node in gm.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fuse_leaves_the_lowering_s_operators_with_values_on_every_node(dtype):
    model = onelora.adapt(Siblings().to(dtype))
    x = torch.randn(5, 4, dtype=dtype)
    with torch.no_grad():
        for name, vector in onelora.vectors(model).items():
            vector.copy_(VECTORS[name])
    gm = captured(model, x)
    expected = model(x)
    share_feature_sum(gm)
    result = fuse_rank1(gm)
    verify(gm, [])
    gm.recompile()
    assert result.rewrites == ["q", "k", "o"]
    operator = ADD_RANK1_BY_MATMUL if dtype == torch.float32 else torch.addcmul  # half precision: a copy of g otherwise
    assert count(gm, operator) == 3
    assert count(gm, ADD_RANK1) == count(gm, FEATURE_SUM) == 0
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert node.meta["example_value"] is not None
        if node.target in (torch.sum, operator):
            assert node.meta["nn_module_stack"]
    out = gm(*gm.inputs)[0]
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
    assert not fuse_rank1(gm).modified


def test_fuse_says_why_it_leaves_a_graph_without_shapes():
    gm, _, _ = inserted()
    share_feature_sum(gm)
    result = fuse_rank1(gm)
    assert not result.modified
    assert set(result.skips.values()) == {"the graph carries no example values"}


def test_run_passes_alone_on_a_traced_graph():
    model = Siblings()
    gm, _, inputs = inserted(model)
    results = run_passes(gm)
    assert [result.name for result in results] == [one.__name__ for one in PIPELINE]
    assert all(result.seconds >= 0 for result in results)
    x = torch.randn(5, 4)
    torch.testing.assert_close(gm(x, *(VECTORS[name] for name in inputs)), adapted_reference(model, x))


def test_subgraphs_of_checkpointing_are_entered():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Siblings):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model = onelora.adapt(Checkpointed())
    x = torch.randn(5, 4, requires_grad=True)
    gm = captured(model, x)
    run_passes(gm)
    inner = [m for m in gm.modules() if isinstance(m, fx.GraphModule) and m is not gm]
    assert inner
    assert all(count(sub, RANK1_UPDATE) == 0 for sub in inner)
    assert sum(count(sub, ADD_RANK1_BY_MATMUL) for sub in inner) == 3
