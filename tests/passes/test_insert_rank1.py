"""insert_rank1 alone: every form of a linear op in a captured graph, chains, attention, and what it refuses."""

import forms
import pytest
import torch
from form_parts import module, weight
from hard_models import HARD
from torch import fx, nn
from torch.fx._symbolic_trace import PH

import onelora_compile as onelora
from onelora_compile.ops import ADAPTED_WEIGHT, RANK1_UPDATE
from onelora_compile.passes import insert_rank1, run_passes
from onelora_compile.testing import fill_vectors, merged_copy, perturb_norms

FORMS = [name for name, (_, _, vectors) in forms.FORMS.items() if vectors is not None]
# What fx.symbolic_trace follows without shapes.
TRACED = ["linear", "matmul", "matmul_T", "left", "sliced", "addmm", "parameter_list"]
# Weights whose uses the graph has inside one node, or in a graph of its own: `insert_weight` is for them.
INSIDE = {"attention", "attention_with_other_widths", "encoder", "transformer", "checkpointed", "branches"}


def captured(model, inputs):
    graphs = []

    def keep(gm, example_inputs):
        graphs.append((gm, example_inputs))
        return gm

    torch.compile(model, backend=keep, fullgraph=True)(**inputs)
    return graphs[0]


def adapted(model, scale=0.5):
    """Its vectors by name, as values, and what the adapted model computes in float64."""
    twin = fill_vectors(onelora.adapt(model), scale)
    vectors = {name: vector.detach().clone() for name, vector in onelora.vectors(twin).items()}
    exact = merged_copy(twin, torch.float64)
    onelora.detach(model)
    return vectors, exact


def check(gm, values, vectors, inputs, expected):
    """Right as it is inserted, and after the passes."""
    gm.recompile()
    given = [vectors[name] for name in inputs]
    for _ in range(2):
        out = gm(*values, *given)
        out = out[0] if isinstance(out, (tuple, list)) else out
        torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
        run_passes(gm)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_in_a_graph_of_dynamo(name):
    model, x, _ = forms.build(name)
    vectors, exact = adapted(model)
    gm, values = captured(model, {"x": x})
    result, inputs = insert_rank1(gm, vectors)
    assert set(inputs) == set(vectors), result.skips
    again, _ = insert_rank1(gm, vectors)
    assert not again.modified
    check(gm, values, vectors, inputs, exact(x.double()))


@pytest.mark.parametrize("name", TRACED)
def test_forms_in_a_graph_without_shapes(name):
    model, x, _ = forms.build(name)
    vectors, exact = adapted(model)
    gm = fx.symbolic_trace(model)
    result, inputs = insert_rank1(gm, vectors)
    assert set(inputs) == set(vectors), result.skips
    gm.recompile()
    torch.testing.assert_close(gm(x, *map(vectors.get, inputs)).double(), exact(x.double()), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", sorted(set(HARD) - INSIDE - {"shared_and_read"}))
def test_hard_models(name):
    make, make_inputs, _ = HARD[name]
    torch.manual_seed(0)
    model, given = perturb_norms(make()).eval(), make_inputs()
    vectors, exact = adapted(model, 0.3)
    gm, values = captured(model, given)
    result, inputs = insert_rank1(gm, vectors)
    assert set(inputs) == set(vectors), result.skips
    doubled = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
    check(gm, values, vectors, inputs, exact(**doubled))


@pytest.mark.parametrize("how", ["symbolic_trace", "dynamo"])
def test_a_chain_sums_what_the_update_before_gave(how):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 5)), torch.randn(6, 4)
    vectors, exact = adapted(model)
    gm, values = (fx.symbolic_trace(model), [x]) if how == "symbolic_trace" else captured(model, {"input": x})
    _, inputs = insert_rank1(gm, vectors)
    assert inputs == ["0", "1", "2"]
    check(gm, values, vectors, inputs, exact(x.double()))


def test_stored_weights_get_an_update_behind_the_op_and_views_one_on_the_weight():
    model = module(lambda s, x: nn.functional.linear(x, s.w) @ s.v.t(), w=weight(6, 8), v=weight(3, 6))
    gm = fx.symbolic_trace(model)
    insert_rank1(gm, {"w": torch.zeros(6), "v": torch.zeros(3)})
    targets = [node.target for node in gm.graph.nodes]
    assert (targets.count(RANK1_UPDATE), targets.count(ADAPTED_WEIGHT)) == (1, 1)


def test_a_weight_under_two_names_is_left_alone_and_said():
    model = module(lambda s, x: x @ s.w[:4].t() + x @ s.w[4:].t(), w=weight(8, 6))
    gm = fx.symbolic_trace(model)
    names = iter(("first", "second"))
    result, inputs = insert_rank1(gm, {"first": torch.zeros(8)}, lambda site: next(names))
    assert inputs == []
    assert "other uses" in result.skips["first"]
    assert result.skips["second"] == "no vector of this name was given"


def test_a_vector_of_the_wrong_shape_is_refused():
    model = module(lambda s, x: x @ s.w.t(), w=weight(6, 8))
    with pytest.raises(onelora.PassError, match=r"the vector 'w' has shape \[8\]; its weight needs \[6\]"):
        insert_rank1(fx.symbolic_trace(model), {"w": torch.zeros(8)})


def test_a_vector_that_no_linear_op_takes_is_said():
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 6), nn.Conv1d(5, 5, 1)))
    result, inputs = insert_rank1(gm, {"0": torch.zeros(6), "1": torch.zeros(5), "2.weight": torch.zeros(6)})
    assert (result.rewrites, inputs) == (["0"], ["0"])
    assert result.skips == dict.fromkeys(("1", "2.weight"), "no linear op of the graph has this name")


class OfDictionary(nn.Sequential):
    def forward(self, inputs):
        return self[0](inputs["x"])


@pytest.mark.parametrize(
    "captured",
    [
        lambda model: torch.export.export(model, (torch.randn(2, 8),)).module(),
        lambda model: fx.symbolic_trace(OfDictionary(*model), {"inputs": {"x": PH}}),
    ],
)
def test_a_graph_that_flattens_its_arguments_is_refused(captured):
    """It would be called with its own number of them, and say so in words of PyTorch's trees."""
    with pytest.raises(onelora.PassError, match="flattens its arguments"):
        insert_rank1(captured(nn.Sequential(nn.Linear(8, 6))), {"0": torch.zeros(6)})
