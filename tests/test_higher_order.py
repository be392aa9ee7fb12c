"""Graphs inside graphs: checkpointing, cond, scan, flex attention."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zoo
from torch import cond, nn
from torch import cond as choose
from torch.utils.checkpoint import checkpoint

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors, merged_copy


class Checkpointed(zoo.MLP):
    reentrant = False

    def forward(self, x):
        h = checkpoint(lambda x: torch.relu(self.a(x)), x, use_reentrant=self.reentrant)
        return checkpoint(lambda h: self.b(h) + self.c(h), h, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Cond(zoo.MLP):
    def forward(self, x):
        h = torch.relu(self.a(x))
        return torch.cond(h.sum() > 0, lambda h: self.b(h), lambda h: self.c(h), (h,))


class CondOnWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: nn.functional.linear(x, self.w), lambda x: x @ self.v, (x,))


class Scan(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        from torch._higher_order_ops.scan import scan

        def step(carry, x):
            carry = torch.tanh(self.a(carry) + self.b(x))
            return carry, carry.clone()

        return scan(step, torch.zeros(8), x)[1]


class Flex(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        y = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - (i - j).abs())
        return self.out(y.transpose(1, 2).flatten(2))


CASES = {
    "checkpoint": (Checkpointed, (5, 8)),
    "reentrant": (Reentrant, (5, 8)),
    "cond": (Cond, (5, 8)),
    "cond_on_weights": (CondOnWeights, (5, 8)),
    "scan": (Scan, (6, 8)),
    "flex": (Flex, (2, 128, 32)),
}
# Of torch 2.13: scan and flex attention have notes of their own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:Return type of scan:UserWarning"),
    # A branch that was not taken has a gradient of zeros.
    pytest.mark.filterwarnings("ignore:vectors that learn nothing, .* exact zeros:onelora_compile.OneLoRAWarning"),
]


def adapted(model):
    return fill_vectors(onelora.adapt(model), 0.5)


def imported_there(s, x):
    from torch import cond as here

    return here(x.sum() > 0, lambda x: nn.functional.linear(x, s.w), lambda x: x @ s.v, (x,))


CONDITIONS = {
    "by its own name": lambda s, x: cond(x.sum() > 0, lambda x: nn.functional.linear(x, s.w), lambda x: x @ s.v, (x,)),
    "by another name": lambda s, x: choose(x.sum() > 0, lambda: nn.functional.linear(x, s.w), lambda: x @ s.v),
    "imported there": imported_there,
    "by keywords": lambda s, x: torch.cond(
        pred=x.sum() > 0, true_fn=lambda x: nn.functional.linear(x, s.w), false_fn=lambda x: x @ s.v, operands=(x,)
    ),
    "of closures": lambda s, x: torch.cond(x.sum() > 0, lambda: nn.functional.linear(x, s.w), lambda: x @ s.v),
    "nested": lambda s, x: torch.cond(
        x.sum() > 0,
        lambda x: torch.cond(x.mean() > 9, lambda x: x @ s.v, lambda x: nn.functional.linear(x, s.w), (x,)),
        lambda x: x @ s.v,
        (x,),
    ),
}


@pytest.mark.parametrize("way", CONDITIONS)
def test_weights_that_only_the_branches_of_a_cond_read_are_adapted_in_one_line(way):
    torch.manual_seed(0)
    model = type("Form", (CondOnWeights,), {"forward": CONDITIONS[way]})()
    x = torch.randn(5, 8)
    base = [model(sign * x) for sign in (1, -1)]
    fast = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    with pytest.warns(onelora.OneLoRAWarning, match="adapted 2 linears"):
        assert torch.equal(fast(x), base[0])
    assert cond is choose is torch.cond  # what stood for it meanwhile is gone
    assert {name: len(vector) for name, vector in onelora.vectors(model).items()} == {"w": 6, "v": 6}
    fill_vectors(model, 0.5)
    for sign, plain in zip((1, -1), base, strict=True):
        torch.testing.assert_close(fast(sign * x), merged_copy(model)(sign * x))
        assert different(fast(sign * x), plain)


def different(a, b):
    return (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", list(CASES))
def test_passes_enter_the_graphs_of_higher_order_ops(name, inner):
    kind, shape = CASES[name]
    torch.manual_seed(0)
    model, x = kind(), torch.randn(shape)
    x.requires_grad_(name == "reentrant")  # which needs an input with a gradient
    with torch.set_grad_enabled(name != "flex"):
        compare(name, inner, model, x)


def compare(name, inner, model, x):
    base = [model(s * x) for s in (1, -1)]
    adapted(model)
    run = torch.compile(model, backend="onelora", options={"inner": inner})
    reference = merged_copy(model)
    for sign, plain in zip((1, -1), base, strict=True):
        expected = reference(sign * x)
        for one in (model, run):
            torch.testing.assert_close(one(sign * x), expected, rtol=1e-4, atol=1e-4)
        assert different(expected, plain)
    if name == "flex":  # has no backward on a CPU
        return
    found = []
    for one in (reference, model, run):
        if one is reference:
            weights = {key: weight_of(reference, key).requires_grad_(True) for key in onelora.vectors(model)}
            one(x).square().sum().backward()
            axis = {"v": 0} if name == "cond_on_weights" else {}
            found.append(
                {key: w.grad if w.grad is None else w.grad.sum(axis.get(key, 1)) for key, w in weights.items()}
            )
            continue
        for vector in onelora.vectors(model).values():
            vector.grad = None
        one(x).square().sum().backward()  # reentrant checkpointing refuses torch.autograd.grad
        found.append({key: vector.grad for key, vector in onelora.vectors(model).items()})
    assert any(gradient is not None and gradient.any() for gradient in found[0].values())
    for key, expected in found[0].items():
        for gradients in found[1:]:
            zeros = torch.zeros_like(onelora.vectors(model)[key])
            actual = zeros if gradients[key] is None else gradients[key]
            torch.testing.assert_close(actual, zeros if expected is None else expected, rtol=1e-3, atol=1e-3)


def weight_of(model, key):
    held = model.get_submodule(key.rpartition(".")[0])
    value = getattr(held, key.rpartition(".")[2])
    return value.weight if isinstance(value, nn.Module) else value


@pytest.mark.parametrize("name", ["checkpoint", "cond", "cond_on_weights"])
def test_fold_inside_higher_order_ops(name, tmp_path):
    kind, shape = CASES[name]
    model, x = kind(), torch.randn(shape)
    adapted(model)
    report = export_onnx(model, (x,), tmp_path / "m.onnx")
    assert set(report.losses) == set(onelora.vectors(model))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for sign in (1, -1):
        (out,) = session.run(None, {session.get_inputs()[0].name: sign * x.numpy()})
        np.testing.assert_allclose(out, merged_copy(model)(sign * x).detach().numpy(), rtol=1e-4, atol=1e-4)
    graph = onnx.load(tmp_path / "m.onnx").graph
    branches = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    names = [value.name for one in (graph, *branches) for value in (*one.initializer, *one.input)]
    assert len(branches) == (2 if name != "checkpoint" else 0)
    assert names
    assert not any("onelora" in one for one in names)


def test_a_weight_that_is_shared_into_a_higher_order_op_is_refused(tmp_path):
    class Shared(Cond):
        tied: torch.Tensor

        def forward(self, x):
            h = torch.relu(self.a(x))
            return super().forward(x) + h @ self.tied.T

    model = Shared()
    model.tied = model.b.weight
    model = fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["a", "b", "c"])), 0.5)
    with pytest.raises(onelora.PassError, match=r"'b': .*another use.*fold or merge it"):
        export_onnx(model, (torch.randn(5, 8),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_only_a_branch_reads_is_named_where_cond_has_another_name():
    class Renamed(CondOnWeights):
        choose = staticmethod(torch.cond)

        def forward(self, x):
            return self.choose(x.sum() > 0, lambda x: nn.functional.linear(x, self.w), lambda x: x @ self.v, (x,))

    model = onelora.adapt(nn.Sequential(nn.Linear(8, 8), Renamed()))
    run = torch.compile(model, backend="onelora", options={"inner": "eager"})
    with pytest.warns(onelora.OneLoRAWarning, match=r"not adapted: .*'1\.w' at .*'1\.v' at .*target_parameters"):
        run(torch.randn(5, 8))


def test_explain_lists_the_linears_inside():
    report = onelora.explain(onelora.adapt(Cond()), torch.randn(5, 8))
    assert [(site.module, site.adapted) for site in report.sites] == [("a", True), ("b", True), ("c", True)]


TRANSFORMS = {
    "vmap": lambda s, x: torch.vmap(s.a)(x) + s.b(x),
    "vmap_of_two": lambda s, x: torch.vmap(lambda y: s.a(y) * s.b(y))(x),
    "vmap_of_vmap": lambda s, x: torch.vmap(torch.vmap(s.a))(x[None]),
    "vmap_beside": lambda s, x: torch.vmap(lambda y: s.a(x) * y)(x) + s.b(x)[0],
    "vmap_of_a_read_weight": lambda s, x: torch.vmap(lambda y: y @ s.w)(x) + torch.vmap(s.a)(x),
    "grad": lambda s, x: torch.func.grad(lambda y: (s.a(y) * s.b(y)).sum())(x),
    "vmap_of_grad": lambda s, x: torch.vmap(torch.func.grad(lambda y: (s.a(y) * s.b(y)).sum()))(x),
    "jacrev": lambda s, x: torch.func.jacrev(lambda y: s.b(torch.tanh(s.a(y))))(x[0]),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_a_forward(name, inner):
    class Transformed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.w = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return TRANSFORMS[name](self, x)

    model, x = Transformed(), torch.randn(5, 8)
    config = onelora.OneLoRAConfig(target_parameters={"w": 0} if "read" in name else {})
    fill_vectors(onelora.adapt(model, config), 0.5)
    run = torch.compile(model, backend="onelora", options={"inner": inner})
    expected = merged_copy(model, torch.float64)(x.double())
    torch.testing.assert_close(run(x).double(), expected, rtol=1e-5, atol=1e-5)
