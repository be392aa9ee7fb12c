"""What the runner checks after each pass, and what it says of one that fails."""

import pytest
import torch
from siblings import Siblings, captured, inserted
from torch import nn

import onelora_compile as onelora
from onelora_compile.ops import RANK1_UPDATE
from onelora_compile.passes import run, share_feature_sum, verify
from onelora_compile.passes.invariants import vectors_of


def test_verify_finds_a_lost_vector():
    gm, _, _ = inserted()
    before = vectors_of(gm)
    update = next(node for node in gm.graph.nodes if node.target is RANK1_UPDATE)
    update.replace_all_uses_with(update.args[0])
    gm.graph.erase_node(update)
    with pytest.raises(onelora.PassError, match="lost its last user"):
        verify(gm, before)


def test_verify_finds_a_vector_of_the_wrong_size():
    model = onelora.adapt(Siblings())
    gm = captured(model, torch.randn(5, 4))
    updates = [node for node in gm.graph.nodes if node.target is RANK1_UPDATE]
    updates[0].replace_input_with(updates[0].args[2], updates[2].args[2])
    with pytest.raises(onelora.PassError, match="vector of 2 entries on 3 features"):
        verify(gm, [])


def test_verify_finds_a_graph_out_of_order():
    gm, _, _ = inserted()
    first = next(node for node in gm.graph.nodes if node.target is RANK1_UPDATE)
    next(iter(gm.graph.nodes)).prepend(first)
    with pytest.raises(onelora.PassError, match="not well-formed"):
        verify(gm, [])


def test_a_pass_that_fails_is_named(monkeypatch):
    def broken(gm):
        raise ValueError("boom")

    with pytest.raises(onelora.PassError, match=r"pass broken failed after \['share_feature_sum'\]: boom"):
        run.run_passes(torch.fx.symbolic_trace(nn.Linear(2, 2)), [share_feature_sum, broken])
