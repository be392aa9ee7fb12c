"""nn.MultiheadAttention and the transformer layers of torch.nn: every weight of them is adapted, on every path."""

import copy

import onnxruntime
import pytest
import torch
from oracle import row_sums
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.passes import expand_attention, match_linear
from onelora_compile.testing import assert_parity, fill_vectors, gradients, merged_copy, perturb_norms

WIDTH, HEADS = 16, 4

# The layers' own: nested tensors are announced, and the fast path's masks.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def fast(model, inner="aot_eager"):
    return torch.compile(model, backend="onelora", options={"inner": inner})


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_multihead_attention(packed, batch_first, need_weights, training):
    sizes = {} if packed else {"kdim": 12, "vdim": 10}
    model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **sizes).train(training)
    q = torch.randn(3, 5, WIDTH)
    k, v = (q, q) if packed else (torch.randn(3, 5, 12), torch.randn(3, 5, 10))
    base = model(q, k, v)[0]
    onelora.adapt(model)
    names = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert list(onelora.vectors(model)) == [*names, "out_proj"]
    assert torch.equal(model(q, k, v)[0], base)
    fill_vectors(model, 0.5)
    merged, reference = merged_copy(model), merged_copy(model, torch.float64)
    exact = reference(q.double(), k.double(), v.double(), need_weights=need_weights)
    for run in (model, fast(model)):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                out, attention = run(q, k, v, need_weights=need_weights)
                plain = merged(q, k, v, need_weights=need_weights)
            assert_parity(out, exact[0], plain[0], floor=16)
            assert not torch.allclose(out, base, atol=1e-2)
            if need_weights:
                assert_parity(attention, exact[1], plain[1], floor=16)
            else:
                assert attention is None
        found = gradients(run(q, k, v)[0].square().sum(), onelora.vectors(model))
        expected = row_sums(model, reference, lambda one: one(q.double(), k.double(), v.double())[0].square().sum())
        baseline = row_sums(model, merged, lambda one: one(q, k, v)[0].square().sum())
        for name, gradient in found.items():
            assert_parity(gradient, expected[name], baseline[name], name, floor=16)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_masks_cross_attention_and_dynamic_length(inner):
    model = fill_vectors(onelora.adapt(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=False)), 0.5)
    merged, reference = merged_copy(model), merged_copy(model, torch.float64)
    run = torch.compile(model, backend="onelora", options={"inner": inner}, dynamic=True)
    for length in (5, 7, 9):
        q, kv = torch.randn(2, length, WIDTH), torch.randn(2, length + 1, WIDTH)
        padding = torch.zeros(2, length + 1, dtype=torch.bool)
        padding[0, -2:] = True
        mask = torch.randn(length, length + 1)
        for keywords in ({}, {"key_padding_mask": padding}, {"attn_mask": mask}):
            wide = {"attn_mask": mask.double()} if "attn_mask" in keywords else keywords
            torch.compiler.reset()  # torch 2.13: a failed guard on other keyword arguments is a KeyError in Dynamo
            for args in ((q, kv, kv), (q, kv, kv.clone())):
                exact = reference(*(arg.double() for arg in args), **wide)[0]
                assert_parity(run(*args, **keywords)[0], exact, merged(*args, **keywords)[0], floor=16)


def test_dropout_and_autocast():
    model = fill_vectors(onelora.adapt(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5)), 0.5)
    x = torch.randn(5, 3, WIDTH)
    run = fast(model)
    assert not torch.equal(run(x, x, x)[0], run(x, x, x)[0])
    model.eval()
    exact = merged_copy(model, torch.float64)(*[x.double()] * 3)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = run(x, x, x)[0], merged_copy(model)(x, x, x)[0]
    assert out.dtype == torch.bfloat16
    assert_parity(out, exact, plain, floor=4)


LAYERS = {
    "encoder_layer": lambda **kw: nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, **kw),
    "encoder": lambda **kw: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, **kw),
        2,
        nn.LayerNorm(WIDTH),
        enable_nested_tensor=not kw.get("norm_first", False),
    ),
    "decoder_layer": lambda **kw: nn.TransformerDecoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, **kw),
    "transformer": lambda **kw: nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.0, batch_first=True, **kw),
}
SITES = {"encoder_layer": 4, "encoder": 8, "decoder_layer": 6, "transformer": 10}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_layers_of_torch(name, training, norm_first, tmp_path):
    torch.manual_seed(1)
    model = perturb_norms(LAYERS[name](norm_first=norm_first)).train(training)
    x = torch.randn(2, 5, WIDTH)
    args = (x,) if name.startswith("encoder") else (x, torch.randn(2, 7, WIDTH))
    base_model, base = copy.deepcopy(model), model(*args)
    onelora.adapt(model)
    assert len(onelora.vectors(model)) == SITES[name]
    fill_vectors(model, 0.5)
    merged, reference = merged_copy(model), merged_copy(model, torch.float64)
    exact = reference(*(arg.double() for arg in args))
    for run in (model, fast(model)):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                assert_parity(run(*args), exact, merged(*args), floor=32)
        assert not torch.allclose(run(*args), base, atol=1e-2)
        found = gradients(run(*args).square().sum(), onelora.vectors(model))
        assert all(gradient.any() for gradient in found.values())
    with onelora.disabled(model):
        wide = copy.deepcopy(base_model).double()(*(arg.double() for arg in args))
        assert_parity(model(*args), wide, base, "disabled", floor=16)
    if not training:
        export_onnx(model, args, tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
        assert_parity(torch.from_numpy(session.run(None, feed)[0]), exact, merged(*args), "ONNX", floor=32)
    twin = copy.deepcopy(model)
    for detached in (onelora.detach(twin), onelora.detach(model)):
        assert torch.equal(detached(*args), base)


def test_the_pass_opens_attention_that_is_not_adapted_only_on_request():
    model = nn.MultiheadAttention(WIDTH, HEADS)
    x = torch.randn(5, 3, WIDTH)
    graphs = []

    def keep(gm, example_inputs):
        from onelora_compile.dynamo import private_api

        graphs.append(private_api.copy_graph(gm))
        return gm.forward

    expected = torch.compile(model, backend=keep)(x, x, x)
    (gm,) = graphs
    result = expand_attention(gm)
    assert list(result.skips.values()) == ["none of its weights is adapted"]
    assert not result.modified
    assert expand_attention(gm, everything=True).modified
    assert not expand_attention(gm, everything=True).modified
    assert [site.kind for site in match_linear(gm)] == ["linear", "linear"]
    assert [(site.in_features, site.out_features) for site in match_linear(gm)] == [(16, 48), (16, 16)]
    gm.recompile()
    inputs = [parameter for parameter in (model.in_proj_bias, model.in_proj_weight)]
    named = {
        "in_proj_bias": inputs[0],
        "in_proj_weight": inputs[1],
        "out_proj_parameters_weight": model.out_proj.weight,
    }
    named["out_proj_parameters_bias"] = model.out_proj.bias
    values = []
    for node in gm.graph.find_nodes(op="placeholder"):
        ending = next((n for n in named if str(node.target).rstrip("_").endswith(n)), None)
        values.append(named[ending] if ending else x)
    torch.testing.assert_close(gm(*values)[0], expected[0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_padded_places_of_an_encoder_are_no_zeros_while_it_is_adapted(training, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).train(training), torch.randn(3, 6, WIDTH)
    mask = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [2]])
    with torch.set_grad_enabled(grad):
        base = model(x, src_key_padding_mask=mask)
        of_base = copy.deepcopy(model).double()(x.double(), src_key_padding_mask=mask)
        fill_vectors(onelora.adapt(model), 0.5)
        exact, plain = (
            merged_copy(model, dtype)(x.to(dtype), src_key_padding_mask=mask) for dtype in (torch.float64, x.dtype)
        )
        for run in (model, fast(model)):
            assert_parity(run(x, src_key_padding_mask=mask), exact, plain)
        with onelora.disabled(model):
            assert_parity(model(x, src_key_padding_mask=mask)[~mask], of_base[~mask], base[~mask])
        onelora.detach(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), base, rtol=0, atol=0)
    assert bool((base[mask] == 0).all()) == (not training and not grad)
    assert (exact[mask] != 0).any()
