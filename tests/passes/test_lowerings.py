"""Lowerings: their operators against float64, which one is chosen and why."""

import dataclasses
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile import kernels
from onelora_compile.ops import ADD_RANK1, RANK1_UPDATE
from onelora_compile.passes import fuse_rank1, pipeline, run_passes, share_feature_sum
from onelora_compile.passes.lowerings import DEFAULT, LOWERINGS, Choice, Lowering, choose, update_of
from onelora_compile.passes.lowerings.producer_consumer import ADD_RANK1_BY_MATMUL
from onelora_compile.passes.sites.linear_site import example
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


def captured(model, *args, dynamic=None):
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm

    torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*args)
    return graphs[0]


def updates(model, *args, dynamic=None):
    gm = captured(model, *args, dynamic=dynamic)
    share_feature_sum(gm)
    return [update_of(node) for node in gm.graph.find_nodes(op="call_function", target=ADD_RANK1)]


class Block(nn.Module):
    """One linear between a norm and an activation, one between two attentions."""

    def __init__(self, **where):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8, **where), nn.Linear(8, 12, **where)
        self.proj = nn.Linear(8, 8, bias=False, **where)

    def forward(self, x):
        a = nn.functional.scaled_dot_product_attention(x, x, x)
        p = self.proj(a.transpose(-1, -2).transpose(-1, -2))
        return nn.functional.gelu(self.fc(self.norm(x))), nn.functional.scaled_dot_product_attention(p, p, p)


# The operator of producer_consumer


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5), (1, 1)], ids=str)
def test_the_operator_is_add_rank1_with_the_same_gradients(shape):
    n = 7
    y, s, b = torch.randn(*shape[:-1], n), torch.randn(*shape[:-1], 1), torch.randn(n)
    up = torch.randn_like(y)
    results = []
    for dtype, function in ((torch.float64, None), (torch.float32, None), (torch.float32, ADD_RANK1_BY_MATMUL)):
        leaves = [t.to(dtype).requires_grad_() for t in (y, s, b)]
        out = function(*leaves) if function else leaves[0] + leaves[1] * leaves[2]
        results.append((out, *torch.autograd.grad(out, leaves, up.to(dtype))))
    for exact, plain, actual in zip(*results, strict=True):
        assert_parity(actual, exact, plain, floor=4)


def test_the_operator_in_every_kind_of_differentiation():
    values = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 4), (2, 3, 1), (4,))]
    assert torch.autograd.gradcheck(ADD_RANK1_BY_MATMUL, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ADD_RANK1_BY_MATMUL, values)
    y, s, b = (value.detach() for value in values)
    mapped = torch.func.vmap(ADD_RANK1_BY_MATMUL, (0, 0, None))(y, s, b)
    torch.testing.assert_close(mapped, y + s * b)
    each = torch.func.vmap(torch.func.grad(lambda b, y, s: ADD_RANK1_BY_MATMUL(y, s, b).sum()), (None, 0, 0))(b, y, s)
    torch.testing.assert_close(each, s.sum(1).expand(2, 4))


@pytest.mark.parametrize("mode", ["training", "no_grad", "inference_mode"])
def test_what_reaches_the_compiler(mode):
    """A pointwise update forward; in backward one matmul for the vector, none of the size of g times s."""
    from functorch.compile import make_boxed_func

    graphs = []

    def keep(gm, inputs):
        graphs.append([str(node.target) for node in gm.graph.nodes if node.op == "call_function"])
        return make_boxed_func(gm.forward)

    from torch._dynamo.backends.common import aot_autograd

    model = fill_vectors(onelora.adapt(nn.Sequential(nn.Linear(6, 5))))
    compiled = torch.compile(model, backend="onelora", options={"inner": aot_autograd(fw_compiler=keep)})
    x = torch.randn(4, 6, requires_grad=mode == "training")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        y = compiled(x)
    torch.testing.assert_close(y, model(x))
    assert graphs[0].count("aten.addcmul.default") == 1
    assert not any("onelora" in target for target in graphs[0])
    if mode == "training":
        y.sum().backward()
        # gW and s g; g b is a product and a sum, which join the kernel that produces g.
        assert graphs[1].count("aten.mm.default") == 2
        assert graphs[1].count("aten.sum.dim_IntList") == 1


# What is known of an update


def test_an_output_that_is_used_besides_keeps_its_linear():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            y = nn.functional.linear(x, self.w)
            return RANK1_UPDATE(y, x, self.b), y

    (update,) = updates(Twice(), torch.randn(5, 8))
    assert update.linear is None


# The choice


def lowering(name, reason=None):
    def never(graph, update):
        raise AssertionError("chosen, not lowered")

    return Lowering(name, lambda update: reason, never)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_rule_asks_no_other(device):
    update = updates(onelora.adapt(Block(device=device)), torch.randn(2, 3, 8, device=device))[0]
    choice = choose(update, lowerings={DEFAULT: lowering(DEFAULT), "other": lowering("other")})
    assert (choice.name, choice.why) == (DEFAULT, "the rule")


def test_a_forced_one():
    update = updates(onelora.adapt(Block()), torch.randn(2, 3, 8))[0]
    lowerings = {DEFAULT: lowering(DEFAULT), "able": lowering("able"), "other": lowering("other", "no other today")}
    assert choose(update, "able", lowerings) == Choice("able", "forced")
    assert choose(update, "other", lowerings) == Choice(DEFAULT, "other: no other today")
    assert choose(update, DEFAULT, lowerings) == Choice(DEFAULT, "forced")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.double(), "no kernel for torch.float64"),
        (lambda model: model, None),
    ],
    ids=["float64", "float32"],
)
def test_why_the_kernel_does_not_take_a_site(monkeypatch, change, reason):
    monkeypatch.setattr("onelora_compile.passes.lowerings.fused_kernel.why_no_kernels", lambda device: None)
    model = change(nn.Sequential(nn.Linear(8, 4)))
    (update,) = updates(onelora.adapt(model), torch.randn(5, 8, dtype=model[0].weight.dtype))
    assert LOWERINGS["fused_kernel"].why_not(update) == reason


def test_the_kernel_does_not_take_autocast_other_ops_and_experts(monkeypatch):
    monkeypatch.setattr("onelora_compile.passes.lowerings.fused_kernel.why_no_kernels", lambda device: None)
    why_not = LOWERINGS["fused_kernel"].why_not
    model = onelora.adapt(nn.Sequential(nn.Linear(8, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        (update,) = updates(model, torch.randn(5, 8))
    assert "autocast" in (why_not(update) or "")

    from transformers.pytorch_utils import Conv1D

    (update,) = updates(onelora.adapt(nn.Sequential(Conv1D(6, 8))), torch.randn(5, 8))
    assert why_not(update) == "the update does not follow a call of linear whose output is used by it alone"


def test_the_kernel_does_not_take_weights_that_are_no_plain_tensors(monkeypatch):
    class Packed(torch.Tensor):
        pass

    monkeypatch.setattr("onelora_compile.passes.lowerings.fused_kernel.why_no_kernels", lambda device: None)
    (update,) = updates(onelora.adapt(nn.Sequential(nn.Linear(8, 4))), torch.randn(5, 8))
    update.linear[1].meta["example_value"] = torch.randn(4, 8).as_subclass(Packed)
    assert (
        LOWERINGS["fused_kernel"].why_not(update) == "the weight is a Packed, not a plain tensor (quantised, sharded)"
    )


def test_without_triton_or_a_gpu(monkeypatch):
    assert kernels.why_not(torch.device("cpu")) == kernels.NO_GPU
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels.why_not(torch.device("cuda")) == kernels.NO_TRITON


# The option


def test_an_unknown_lowering_lists_the_valid_ones():
    with pytest.raises(Exception, match="lowering='fastest': there is 'producer_consumer', 'fused_kernel'"):
        torch.compile(onelora.adapt(zoo.MLP()), backend="onelora", options={"lowering": "fastest"})(torch.randn(2, 8))


def test_a_forced_lowering_that_no_linear_can_take_is_an_error():
    with pytest.raises(Exception, match="none of 3 linears can take it: fused_kernel: Triton needs a CUDA GPU"):
        torch.compile(onelora.adapt(zoo.MLP()), backend="onelora", options={"lowering": "fused_kernel"})(
            torch.randn(2, 8)
        )


def test_a_forced_lowering_that_some_can_take_warns_and_is_right(monkeypatch):
    """The others get the default; which they are is in the warning."""
    real = LOWERINGS["producer_consumer"]

    def why_not(update):
        vector = example(update.vector)
        return None if vector is not None and len(vector) == 12 else "not that wide"

    picky = dataclasses.replace(real, name="picky", why_not=why_not)
    monkeypatch.setitem(LOWERINGS, "picky", picky)
    model, x = fill_vectors(onelora.adapt(Block())), torch.randn(2, 3, 8)
    compiled = torch.compile(model, backend="onelora", options={"inner": "aot_eager", "lowering": "picky"})
    with pytest.warns(onelora.OneLoRAWarning, match=r"1 linears can't take it and get the default: 'proj': picky: not"):
        outputs = compiled(x)
    for actual, expected in zip(outputs, merged_copy(model)(x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_forced_default_says_nothing():
    model, x = fill_vectors(onelora.adapt(zoo.MLP())), torch.randn(2, 8)
    options: dict[str, Any] = {"inner": "aot_eager", "lowering": "producer_consumer"}
    torch.testing.assert_close(torch.compile(model, backend="onelora", options=options)(x), model(x))


def test_run_passes_reports_the_skip():
    gm = captured(onelora.adapt(Block()), torch.randn(2, 3, 8))
    result = {one.name: one for one in run_passes(gm, pipeline("fused_kernel"))}["fuse_rank1"]
    assert result.rewrites == ["fc", "proj"] or result.rewrites == ["proj", "fc"]
    assert set(result.skips.values()) == {"fused_kernel: Triton needs a CUDA GPU"}
    assert not fuse_rank1(gm).modified


def test_explain_says_which_and_why():
    report = onelora.explain(onelora.adapt(zoo.MLP()), torch.randn(2, 8))
    assert {(site.lowering, site.why) for site in report.sites} == {("producer_consumer", "the rule")}
    assert "producer_consumer: the rule" in " ".join(str(report).split())
