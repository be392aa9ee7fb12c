"""Weights that are used without their module being called: eager, compiled, folded, and what backward costs."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from form_parts import module, weight
from forms import ADAPTED, FORMS, LONG, build
from oracle import row_sums
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.adapting.adapter_state import adapted_weights
from onelora_compile.exporters import export_onnx
from onelora_compile.passes import run_passes
from onelora_compile.testing import assert_parity, fill_vectors, gradients, merged_copy

# The update stays on the weight: what is written in place, an input that has one entry for an axis of the weight, and
# a weight that is used as W and as its transpose.
ON_THE_WEIGHT = {"addmm_in_place", "baddbmm_in_place", *(name for name in FORMS if name.endswith("_for_all"))}
ON_THE_WEIGHT |= {"called_and_transposed", "called_and_transposed_square", "both_ways_of_a_linear"}


def compiled(model):
    return torch.compile(model, backend="onelora", options={"inner": "aot_eager"}, fullgraph=True)


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
