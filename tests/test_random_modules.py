"""Random modules composed of linear forms, views, shared weights and dtypes: eager = compiled = reference."""

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import row_sums
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, gradients, merged_copy

WIDTHS = st.sampled_from([1, 3, 4, 8])


class Step(nn.Module):
    """One linear map [*, n] -> [*, m] in one of many spellings, of norm about 1 so that rounding errors stay small."""

    def __init__(self, kind, n, m):
        super().__init__()
        self.kind, self.n, self.m = kind, n, m
        if kind == "module":
            self.fc = nn.Linear(n, m)
        elif kind in ("stored_in_out", "einsum_in_out", "addmm"):
            self.w = nn.Parameter(torch.randn(n, m) / n**0.5)
        elif kind in ("packed", "packed_chunks"):
            self.w = nn.Parameter(torch.randn(3 * m, n) / n**0.5)
        elif kind == "heads":
            self.w = nn.Parameter(torch.randn(2, m, n) / n**0.5)
        else:
            self.w = nn.Parameter(torch.randn(m, n) / n**0.5)

    def forward(self, x):
        kind = self.kind
        if kind == "module":
            return self.fc(x)
        if kind == "linear":
            return F.linear(x, self.w)
        if kind == "stored_in_out":
            return x @ self.w
        if kind == "transposed":
            return torch.matmul(x, self.w.transpose(0, 1))
        if kind == "left":
            return (self.w @ x.mT).mT
        if kind == "einsum":
            return torch.einsum("...i,oi->...o", x, self.w)
        if kind == "einsum_in_out":
            return torch.einsum("bni,io->bno", x, self.w)
        if kind == "addmm":
            return torch.addmm(torch.ones(self.m, dtype=x.dtype), x.flatten(0, 1), self.w).view(*x.shape[:2], self.m)
        if kind == "packed":
            return F.linear(x, self.w[: self.m]) + F.linear(x, self.w[self.m : 2 * self.m]) * 0.5
        if kind == "packed_chunks":
            a, b, c = (x @ w.T for w in self.w.chunk(3))
            return a + b * c.sigmoid()
        if kind == "heads":
            return torch.einsum("bni,hoi->bnho", x, self.w).sum(-2)
        raise AssertionError(kind)


KINDS = ["module", "linear", "stored_in_out", "transposed", "left", "einsum", "einsum_in_out", "addmm", "packed"]
KINDS += ["packed_chunks", "heads"]


class Net(nn.Module):
    def __init__(self, first, plan):
        super().__init__()
        self.steps, self.plan = nn.ModuleList(), []
        width = first
        for kind, out, again in plan:
            fitting = [i for i, old in enumerate(self.steps) if (old.n, old.m) == (width, out)]
            if again and fitting:  # the same module once more
                self.plan.append(fitting[-1])
            else:
                self.plan.append(len(self.steps))
                self.steps.append(Step(kind, width, out))
            width = out

    def forward(self, x):
        for index in self.plan:
            x = torch.sin(self.steps[index](x))  # tanh saturates: 1 - y² then magnifies a last bit
        return x


@settings(max_examples=40)
@given(
    first=WIDTHS,
    plan=st.lists(st.tuples(st.sampled_from(KINDS), WIDTHS, st.booleans()), min_size=1, max_size=5),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 5),
)
def test_eager_compiled_and_reference_agree(first, plan, tied, dtype, seed):
    torch.compiler.reset()
    torch.manual_seed(seed)
    net = Net(first, plan)
    if tied:  # two modules share one weight, with a vector each
        alike: dict[tuple[int, int], nn.Parameter] = {}
        modules: list[Any] = [step for step in net.steps if step.kind == "module"]
        for step in modules:
            step.fc.weight = alike.setdefault((step.n, step.m), step.fc.weight)
    net = net.to(dtype)
    x = torch.randn(2, 3, first).to(dtype)
    base, weights = net(x), copy.deepcopy(net.state_dict())
    onelora.adapt(net)
    assert len(onelora.vectors(net)) == len(net.steps)
    assert_parity(net(x), base.double(), base, "zero vectors", floor=8)  # a matmul's last bit depends on alignment
    fill_vectors(net, 0.2, seed)
    exact, plain = merged_copy(net, torch.float64)(x.double()), merged_copy(net)(x)
    compiled = torch.compile(net, backend="onelora", options={"inner": "eager"}, fullgraph=True)
    for run in (net, compiled):
        assert_parity(run(x), exact, plain, factor=3, floor=64)

    def loss(run, x):
        return run(x).double().square().sum()

    exact_copy = merged_copy(net, torch.float64)
    expected = row_sums(net, exact_copy, lambda one: loss(one, x.double()))
    terms = row_sums(net, exact_copy, lambda one: loss(one, x.double()), absolute=True)
    size = max(float(value.max()) for value in terms.values())
    for run in (net, compiled):
        for name, gradient in gradients(loss(run, x), onelora.vectors(net)).items():
            error = float((gradient - expected[name]).abs().max())
            assert error <= 64 * torch.finfo(dtype).eps * size, (name, error, size)
    onelora.detach(net)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
