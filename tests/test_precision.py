"""Dtypes, autocast, the meta device, copies and threads: the same function everywhere."""

import copy
import io
import threading
from typing import Any

import pytest
import torch
import zoo
from form_parts import module, weight
from forms import build
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

HALVES = [torch.bfloat16, torch.float16]


class Mixed(nn.Module):
    """A called linear, a packed parameter in parts, attention."""

    def __init__(self, width=32):
        super().__init__()
        self.fc, self.qkv = nn.Linear(width, width), weight(3 * width, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x):
        q, k, v = (x @ w.T for w in self.qkv.chunk(3))
        return self.fc(self.attention(q, k, v, need_weights=False)[0])


def compiled(model):
    return torch.compile(model, backend="onelora", options={"inner": "aot_eager"})


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_in_half_precision(dtype, when):
    torch.manual_seed(0)
    model = Mixed()
    if when == "before":
        model = fill_vectors(onelora.adapt(model.to(dtype)), 0.05)
        assert {v.dtype for v in onelora.vectors(model).values()} == {torch.float32}
    else:  # .half() converts the vectors too, as every other parameter
        model = fill_vectors(onelora.adapt(model), 0.05).to(dtype)
        assert {v.dtype for v in onelora.vectors(model).values()} == {dtype}
    x = torch.randn(3, 7, 32)
    reference = merged_copy(model, torch.float64)(x.to(dtype).double())
    plain = merged_copy(model)(x.to(dtype))
    for run in (model, compiled(model)):
        out = run(x.to(dtype))
        assert out.dtype == dtype
        assert_parity(out, reference, plain, floor=8)
        gradients = torch.autograd.grad(run(x.to(dtype)).float().square().sum(), list(onelora.vectors(model).values()))
        assert all(g.any() and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype):
    torch.manual_seed(0)
    model = fill_vectors(onelora.adapt(Mixed()), 0.05)
    x = torch.randn(3, 7, 32)
    reference = merged_copy(model, torch.float64)(x.double())
    with torch.autocast("cpu", dtype):
        plain = merged_copy(model)(x)
        for run in (model, compiled(model)):
            out = run(x)
            assert out.dtype == dtype
            assert_parity(out, reference, plain, floor=8)
            out.float().square().sum().backward()
    assert all(v.grad is not None and v.grad.any() for v in onelora.vectors(model).values())


def test_the_update_of_a_half_precision_weight_is_not_rounded_into_it_when_compiled():
    # W + b in bfloat16 swallows small entries of b; on the activation side they count.
    model = module(lambda s, x: x @ s.w.T, w=nn.Parameter(torch.ones(4, 256)))
    onelora.adapt(model.bfloat16())
    with torch.no_grad():
        onelora.vectors(model)["w"].fill_(1e-3)  # less than half a step of bfloat16 at 1
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    exact = 256 * 1.001
    assert model(x)[0, 0] == 256
    assert abs(compiled(model)(x)[0, 0].item() - exact) <= 1  # a step of bfloat16 at 256 is 2
    assert compiled(model)(x * 8)[0, 0].item() == pytest.approx(8 * exact, rel=2**-8)


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_meta_device_then_load(how):
    torch.manual_seed(0)
    weights = Mixed().state_dict()
    expected = Mixed()
    expected.load_state_dict(weights)
    with torch.device("meta"):
        model = Mixed()
    onelora.adapt(model)
    assert all(v.is_meta for v in onelora.vectors(model).values())
    if how == "to_empty":
        model.to_empty(device="cpu")
        assert model.load_state_dict(weights, strict=False).unexpected_keys == []
    else:
        model.load_state_dict(weights, strict=False, assign=True)
    assert not any(v.any() for v in onelora.vectors(model).values())
    x = torch.randn(3, 7, 32)
    assert torch.equal(model(x), expected(x))
    fill_vectors(model, 0.1)
    torch.testing.assert_close(compiled(model)(x), merged_copy(model)(x), rtol=1e-4, atol=1e-5)


def test_state_dict_round_trip_keeps_the_vectors():
    model, twin = fill_vectors(onelora.adapt(Mixed()), 0.1), onelora.adapt(Mixed())
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, 7, 32)
    assert torch.equal(twin(x), model(x))


def test_pickles_and_copies_of_every_form():
    for model, x in (
        (Mixed(), torch.randn(3, 7, 32)),
        build("parameter_list")[:2],
        build("bmm")[:2],
    ):
        fill_vectors(onelora.adapt(model), 0.1)
        expected = model(x)
        buffer = io.BytesIO()
        if isinstance(model, Mixed):  # the others are of local classes, which nobody can pickle
            torch.save(model, buffer)
            buffer.seek(0)
            assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
        twin = copy.deepcopy(model)
        fill_vectors(twin, 0.1, seed=8)
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)
        onelora.detach(twin)
        assert torch.equal(model(x), expected)


# Seen on a base with backend="aot_eager": a segmentation fault, or FX and Dynamo in each other's way.
@pytest.mark.skipif(torch.__version__ < "2.13", reason="threads can't compile at the same time before torch 2.13")
def test_threads_with_models_of_their_own():
    models = [fill_vectors(onelora.adapt(Mixed()), 0.1, seed=i) for i in range(4)]
    x = torch.randn(3, 7, 32)
    expected = [merged_copy(model)(x) for model in models]
    runs, failed = [compiled(model) for model in models], []

    def work(run, reference):
        try:
            for _ in range(20):
                torch.testing.assert_close(run(x), reference, rtol=1e-4, atol=1e-5)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(runs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]


@pytest.mark.parametrize("how", ["submodule", "model.compile", "block by block"])
def test_ways_to_compile(how):
    model, inputs = zoo.tiny_vit()
    fill_vectors(onelora.adapt(model), 0.05)
    expected = merged_copy(model)(**inputs)
    backend: dict[str, Any] = {"backend": "onelora", "options": {"inner": "aot_eager"}}
    if how == "submodule":
        model.blocks[0] = torch.compile(model.blocks[0], **backend)
    elif how == "model.compile":
        model.compile(**backend)
    else:
        for block in model.blocks:
            block.compile(**backend)
    assert list(onelora.vectors(model))[1] == "blocks.0.qkv"
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-4)


def test_dynamic_batch_and_length_of_every_form_of_reading():
    from counted_graphs import Counter

    model = fill_vectors(onelora.adapt(Mixed()), 0.1)
    counter = Counter()
    run = torch.compile(model, backend="onelora", options={"inner": counter}, dynamic=True)
    for batch, length in ((3, 7), (5, 9), (2, 4)):
        x = torch.randn(batch, length, 32)
        torch.testing.assert_close(run(x), merged_copy(model)(x), rtol=1e-4, atol=1e-5)
    assert len(counter.graphs) == 1


def test_graph_breaks_between_reads():
    class Broken(Mixed):
        def forward(self, x):
            q, k, v = (x @ w.T for w in self.qkv.chunk(3))
            torch._dynamo.graph_break()
            return self.fc(self.attention(q, k, v, need_weights=False)[0])

    model = fill_vectors(onelora.adapt(Broken()), 0.1)
    x = torch.randn(3, 7, 32)
    torch.testing.assert_close(compiled(model)(x), merged_copy(model)(x), rtol=1e-4, atol=1e-5)


def test_patch_embedding_and_pointwise_convolutions_on_request(tmp_path):
    from onelora_compile.exporters import export_onnx

    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 6, 1), nn.Flatten(2), nn.Linear(16, 5))
    x = torch.randn(2, 3, 16, 16)
    base = model(x)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["3"]
    assert {name: "name it in target_modules" in why for name, why in onelora.summary(model).not_linear.items()} == {
        "0": True,
        "1": True,
    }
    onelora.detach(model)
    fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(target_modules=["0", "1", "3"])), 0.3)
    assert {name: len(v) for name, v in onelora.vectors(model).items()} == {"0": 8, "1": 6, "3": 5}
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    run = torch.compile(model, backend="onelora", options={"inner": keep})
    expected = merged_copy(model, torch.float64)(x.double())
    for one in (model, run):
        assert_parity(one(x), expected, merged_copy(model)(x), floor=8)
    assert (one(x) - base).abs().max() > 0.1
    assert not graphs[0].graph.find_nodes(op="call_function", target=torch.ops.onelora.adapted_weight.default)
    export_onnx(model, (x,), tmp_path / "m.onnx")
    with pytest.raises(onelora.TargetError, match="only '0': a convolution, not a linear op of the method"):
        onelora.adapt(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(2, 2)), onelora.OneLoRAConfig(target_modules=["0"]))


def test_grouped_matmul_of_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = weight(3, 32, 16), weight(3, 16, 32)

        def forward(self, x, ends):
            h = torch.relu(torch.nn.functional.grouped_mm(x, self.up.mT, offs=ends))
            return torch.nn.functional.grouped_mm(h, self.down.transpose(-2, -1), offs=ends)

    torch.manual_seed(0)
    model = Experts().bfloat16()
    onelora.adapt(model)
    assert {name: tuple(v.shape) for name, v in onelora.vectors(model).items()} == {"up": (3, 32), "down": (3, 16)}
    fill_vectors(model, 0.05)
    x, ends = torch.randn(12, 16).bfloat16(), torch.tensor([5, 5, 12], dtype=torch.int32)
    merged = merged_copy(model, torch.float64)
    rows = torch.tensor([0] * 5 + [2] * 7)
    h = torch.relu(torch.einsum("ni,noi->no", x.double(), merged.get_parameter("up")[rows]))
    exact = torch.einsum("ni,noi->no", h, merged.get_parameter("down")[rows])
    plain = merged_copy(model)(x, ends)
    for run in (model, compiled(model)):
        out = run(x, ends)
        assert_parity(out, exact, plain, floor=4)
        gradients = torch.autograd.grad(run(x, ends).float().sum(), list(onelora.vectors(model).values()))
        assert all(g[[0, 2]].any() and not g[1].any() for g in gradients)
