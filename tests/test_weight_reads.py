"""Weights that are used without their module being called: eager, compiled, folded, and what backward costs."""

import copy
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from forms import FORMS, SPELLINGS, build, module, weight
from named_uses import NAMED
from oracle import row_sums
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.adapting.adapter_state import adapted_weights
from onelora_compile.exporters import export_onnx
from onelora_compile.passes import run_passes
from onelora_compile.testing import assert_parity, fill_vectors, gradients, merged_copy
from onelora_compile.weight_uses.weight_reads import NOT_TOLD

ADAPTED = [name for name, (_, _, vectors) in FORMS.items() if vectors is not None]
LONG = [pytest.param(name, marks=[pytest.mark.slow] * (name in SPELLINGS)) for name in ADAPTED]
# The update stays on the weight: what is written in place, an input that has one entry for an axis of the weight, and
# a weight that is used as W and as its transpose.
ON_THE_WEIGHT = {"addmm_in_place", "baddbmm_in_place", *(name for name in FORMS if name.endswith("_for_all"))}
ON_THE_WEIGHT |= {"called_and_transposed", "called_and_transposed_square", "both_ways_of_a_linear"}


def compiled(model, inner="aot_eager"):
    return torch.compile(model, backend="onelora", options={"inner": inner}, fullgraph=True)


def weighted(out):
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)).sum()


@pytest.mark.parametrize("name", ADAPTED)
def test_every_form_is_adapted_in_eager_and_compiled(name):
    model, x, expected = build(name)
    base = model(x)
    onelora.adapt(model)
    assert {key: tuple(v.shape) for key, v in onelora.vectors(model).items()} == expected
    assert torch.equal(model(x), base)
    fill_vectors(model, 0.5)
    reference = merged_copy(model, torch.float64)
    merged = merged_copy(model)
    sums = row_sums(model, reference, lambda one: weighted(one(x.double())))
    baseline = row_sums(model, merged, lambda one: weighted(one(x)))
    for run in (model, compiled(model)):
        out = run(x)
        assert_parity(out, reference(x.double()), merged(x), floor=8)
        assert not torch.allclose(out, base, atol=1e-3)
        for key, gradient in gradients(weighted(out), onelora.vectors(model)).items():
            assert_parity(gradient, sums[key], baseline[key], key, floor=8)
    assert torch.equal(onelora.detach(model)(x), base)


@pytest.mark.parametrize("mode", ["fold", pytest.param("input", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LONG)
def test_every_form_goes_into_onnx(name, mode, tmp_path):
    model, x, _ = build(name)
    fill_vectors(onelora.adapt(model), 0.5)
    if mode == "input" and "" in onelora.vectors(model):  # the model is the linear
        with pytest.raises(onelora.ExportError, match=r"^adapters='input': .* its vector has no name to swap it by"):
            export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode)
        return
    report = export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode)
    assert not report.unused
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, merged_copy(model)(x).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [one for one in LONG if one.values[0] not in ON_THE_WEIGHT | {"one_column"}])
def test_no_weight_is_summed_forward_and_none_has_a_gradient(name):
    """In the joint graph nothing but views has the size of the weight: no W + b, no gradient of W.

    Of one column the row sums are the weight.
    """
    model, x, _ = build(name)
    onelora.adapt(model)
    sizes = {target.weight.numel() for target in adapted_weights(model).values() if target.weight is not None}
    computed = []

    def count(gm, example_inputs):
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            views = (
                "view",
                "_unsafe_view",
                "permute",
                "expand",
                "slice",
                "select",
                "transpose",
                "t.",
                "unsqueeze",
                "split",
                "alias",
            )
            if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.numel() not in sizes:
                continue
            if not any(str(node.target).startswith(f"aten.{view}") for view in views):
                computed.append(str(node.target))
        return make_boxed_func(gm.forward)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    # Batches of another size than any weight: 59 rows.
    x = torch.randn(59, *x.shape[1:]) if x.ndim == 2 else x
    inner = aot_autograd(fw_compiler=count, bw_compiler=count)
    fast = torch.compile(model, backend="onelora", options={"inner": inner}, fullgraph=True)
    fast(x).sum().backward()
    # Of the base: clone is .contiguous().
    assert [op for op in computed if op != "aten.clone.default"] == []
    assert all(vector.grad is not None and vector.grad.any() for vector in onelora.vectors(model).values())


@pytest.mark.parametrize("name", NAMED)
def test_every_other_use_in_a_contraction_is_named(name):
    form, x, expected = build(name, NAMED)
    model = nn.ModuleDict({"form": form, "fc": nn.Linear(3, 3)})
    base = form(x)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["fc"]
    report = onelora.summary(model)
    named = report.skipped | report.not_linear
    assert {key.removeprefix("form.") for key in named} == set(expected)
    assert all(expected[key.removeprefix("form.")] in why for key, why in named.items())
    assert torch.equal(form(x), base)


@pytest.mark.parametrize("name", [*NAMED, *LONG])
def test_what_adapt_could_not_follow_is_named_by_the_graph(name):
    form, x, expected = build(name, FORMS | NAMED)
    kind = type(form)

    def forward(self, x):
        {x.shape: 0}[torch.Size([*x.shape])]  # a KeyError while adapt follows the code without values
        return kind.forward(self, x)

    form.__class__ = type("Hidden", (kind,), {"forward": forward})
    model = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1]), form)
    onelora.adapt(model)
    skipped, names = onelora.summary(model).skipped, {f"1.{key}".removesuffix(".") for key in expected}
    inside = {f"1.{key}" for key, child in form.named_children() if isinstance(child, nn.Linear)}
    assert {*onelora.vectors(model)} == {"0", *inside}  # the weight of a linear inside is adapted, whoever reads it
    names -= inside
    added = getattr(form, "c", None)
    others = {"1.c"} - names if isinstance(added, nn.Parameter) and added.ndim > 1 else set()  # looks like a weight
    assert {
        *skipped,
        *onelora.summary(model).not_linear,
    } == names | others  # by adapt, which does not know what they are
    known = {*(key for key, why in skipped.items() if NOT_TOLD not in why), *onelora.summary(model).not_linear}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(compiled(model, "eager")(x), form(model[0](x)))
    report = onelora.summary(model)
    assert names | others == {*report.skipped, *report.not_linear}
    new = [str(one.message) for one in caught if issubclass(one.category, onelora.OneLoRAWarning)]
    assert len(new) == (names != known)
    assert all(f"{key!r} at " in message and "target_parameters" in message for message in new for key in names - known)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_graph_names_no_parameter_that_is_an_input_or_of_a_module_that_is_known_as_a_whole():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.pool = weight(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.q, self.k, self.cell = nn.Linear(8, 8), nn.Linear(8, 8), nn.GRUCell(8, 8)
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(5, 5, 3, padding=1))
            self.old, self.spectral = nn.utils.weight_norm(nn.Conv1d(5, 5, 1)), nn.Linear(8, 8)
            nn.utils.parametrizations.spectral_norm(self.spectral)

        def forward(self, x):
            q = self.q(self.queries).expand(len(x), -1, -1)
            x = self.old(self.conv(F.scaled_dot_product_attention(q, self.k(self.queries * 2), x)))
            pooled = self.pool(self.queries.repeat(len(x), 1, 1), x, x, need_weights=False)[0]
            return self.cell(self.spectral(pooled[:, 0]))

    model = Whole().eval()
    onelora.adapt(model)
    known = onelora.summary(model).skipped
    assert "old" in onelora.summary(model).not_linear  # its weight is computed: no linear map of patches
    compiled(model, "eager")(torch.randn(2, 5, 8))  # a warning would be an error
    assert onelora.summary(model).skipped == known


def test_a_weight_used_both_ways_is_reported():
    model, _, _ = build("slices")
    with pytest.raises(onelora.TargetError, match="as W and as its transpose"):
        onelora.adapt(model)
    model = nn.Sequential(model, nn.Linear(1, 3))
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["1"]
    assert "as W and as its transpose" in str(onelora.summary(model))


def test_an_embedding_that_is_tied_to_the_head_does_not_change():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(11, 8), nn.Linear(8, 8)

        def forward(self, ids):
            return self.fc(self.embed(ids)) @ self.embed.weight.T

    model = Tied()
    ids = torch.arange(6)
    embedded = model.embed(ids)
    fill_vectors(onelora.adapt(model), 0.5)
    assert list(onelora.vectors(model)) == ["fc"]
    assert torch.equal(model.embed(ids), embedded)
    assert "the embedding would change" in str(onelora.summary(model))
    torch.testing.assert_close(compiled(model)(ids), merged_copy(model)(ids))


def test_a_view_that_mixes_inputs_and_outputs_stays_on_the_weight_side():
    model = module(lambda s, x: F.linear(x, s.w) + F.linear(x, s.w.reshape(8, 6).T.contiguous()), w=weight(6, 8))
    x = torch.randn(5, 8)
    onelora.adapt(model)
    fill_vectors(model, 0.5)
    torch.testing.assert_close(compiled(model)(x), merged_copy(model)(x))


def test_other_uses_of_an_adapted_weight_see_it_too():
    # weight standardisation, a norm of the weight: whatever reads the weight reads W + b 1^T
    model = module(lambda s, x: F.linear(x, s.w) / s.w.norm() + F.linear(x, s.w * 2), w=weight(6, 8))
    x = torch.randn(5, 8)
    fill_vectors(onelora.adapt(model), 0.5)
    for run in (model, compiled(model)):
        torch.testing.assert_close(run(x), merged_copy(model)(x))


def test_twenty_vectors_one_graph_and_disabled():
    from counted_graphs import Counter

    model, x, _ = build("chunked")
    base = model(x)
    onelora.adapt(model)
    counter = Counter()
    fast = torch.compile(model, backend="onelora", options={"inner": counter})
    for seed in range(20):
        fill_vectors(model, 0.5, seed)
        torch.testing.assert_close(fast(x), merged_copy(model)(x))
    with onelora.disabled(model):
        assert torch.equal(model(x), base)
        torch.testing.assert_close(fast(x), base)
    assert len(counter.graphs) == 1


def test_state_dict_and_copies_and_files(tmp_path):
    model, x, _ = build("chunked")
    before = copy.deepcopy(model.state_dict())
    fill_vectors(onelora.adapt(model), 0.5)
    assert {key: v for key, v in model.state_dict().items() if "onelora" not in key}.keys() == before.keys()
    assert torch.equal(model.state_dict()["w"], before["w"])
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    onelora.detach(twin)
    torch.testing.assert_close(model(x), merged_copy(model)(x))  # the copy's way back is its own
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    other, _, _ = build("chunked")
    other.load_state_dict(before)
    onelora.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x))
    expected = merged_copy(model)(x)
    onelora.merge(model)
    torch.testing.assert_close(model(x), expected)
    assert type(model).__name__ == "Form"
    assert list(model.state_dict()) == list(before)


def test_the_files_know_their_base_for_experts_too(tmp_path):
    model, _, _ = build("bmm")
    onelora.save_adapter(fill_vectors(onelora.adapt(model)), tmp_path / "a.safetensors")
    with torch.no_grad():
        model._parameters["w"] += 0.3
    with pytest.raises(onelora.BaseMismatchError, match="w"):
        onelora.load_adapter(onelora.detach(model), tmp_path / "a.safetensors")


def test_patterns_name_parameters():
    model, _, _ = build("parameter_list")
    onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["ws.1"]))
    assert list(onelora.vectors(model)) == ["ws.1"]
    assert onelora.summary(model).skipped == {"ws.0": "not selected by target_modules"}
    onelora.detach(model)
    with pytest.raises(onelora.TargetError, match=r"'ws.7' matches no module. The linears of this model: ws.0, ws.1"):
        onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["ws.7"]))


class Opaque(nn.Module):
    """A forward that no symbolic trace follows."""

    def __init__(self):
        super().__init__()
        self.fc, self.w = nn.Linear(8, 8), weight(8, 6)

    def forward(self, x):
        x = self.fc(x)
        scale = {x.shape: 2.0}[torch.Size([*x.shape])]  # a KeyError without values
        return (x @ self.w) * scale


def test_what_adapt_could_not_find_is_named_and_can_be_asked_for(tmp_path):
    model, x = Opaque(), torch.randn(5, 8)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["fc"]
    fast = compiled(model)
    with pytest.warns(onelora.OneLoRAWarning, match=r"not adapted: .*'w' at .*x @ self\.w.*target_parameters"):
        fast(x)
    assert "w" in onelora.summary(model).skipped
    onelora.detach(model)
    onelora.adapt(model, onelora.OneLoRAConfig(target_parameters={"w": 0}))
    assert {name: len(v) for name, v in onelora.vectors(model).items()} == {"fc": 8, "w": 6}
    fill_vectors(model, 0.5)
    torch.testing.assert_close(fast(x), merged_copy(model)(x))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    twin = copy.deepcopy(onelora.detach(copy.deepcopy(model)))
    assert torch.equal(onelora.load_adapter(twin, tmp_path / "a.safetensors")(x), model(x))
    for bad, message in (
        ({"v": 0}, "matches no parameter"),
        ({"w": 2}, "no input axis 2"),
        ({"fc.bias": 0}, "weight of"),
    ):
        with pytest.raises(onelora.TargetError, match=message):
            onelora.adapt(Opaque(), onelora.OneLoRAConfig(target_parameters=bad))
    with pytest.raises(onelora.ConfigError, match="dict of names and input axes"):
        onelora.OneLoRAConfig(target_parameters=["w"])  # type: ignore[arg-type]


def test_the_passes_alone_on_a_traced_graph():
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x, _ = build("einsum_heads")
    fill_vectors(onelora.adapt(model), 0.5)
    gm = make_fx(
        lambda w, b, x: torch.einsum("ibh,hnd->ibnd", x, torch.ops.onelora.adapted_weight(w, b, [0])), pre_dispatch=True
    )(model._parameters["w"].detach(), onelora.vectors(model)["w"].detach(), x)
    results = {result.name: result for result in run_passes(gm)}
    # Nothing tells that an input of this graph is a parameter.
    assert not results["weight_to_activation"].rewrites
    torch.testing.assert_close(gm(model._parameters["w"], onelora.vectors(model)["w"], x), model(x))


def test_reading_the_code_leaves_no_trace(capsys):
    class Chatty(nn.Module):
        steps: torch.Tensor

        def __init__(self):
            super().__init__()
            self.w, self.calls, self.seen = weight(6, 8), 0, []
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x, verbose=True):
            self.calls += 1
            self.steps += 1
            if verbose:
                print("forward", x.shape)
            self.last = x
            return F.linear(x, self.w)

    model = Chatty()
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["w"]
    assert capsys.readouterr().out == ""
    assert (model.calls, model.steps.item(), hasattr(model, "last")) == (0, 0, False)
