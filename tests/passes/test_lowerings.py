"""Lowerings: their operators against float64, which one is chosen and why, and what is kept of measurements."""

import dataclasses
import json
import logging
import threading

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile import kernels
from onelora_compile.ops import ADD_RANK1, RANK1_UPDATE
from onelora_compile.passes import fuse_rank1, run_passes, share_feature_sum
from onelora_compile.passes.lowerings import DEFAULT, LOWERINGS, Lowering, Shape, choose, update_of
from onelora_compile.passes.lowerings.measured import seconds
from onelora_compile.passes.lowerings.producer_consumer import ADD_RANK1_BY_MATMUL
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

SHAPE = Shape(512, 384, 1536, torch.float32, torch.float32, True, False, False, True)


def captured(model, *args, dynamic=None):
    graphs = []
    torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True, dynamic=dynamic)(*args)
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
    from torch._functorch.aot_autograd import make_boxed_func

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


def test_neighbours():
    proj, fc = updates(onelora.adapt(Block()), torch.randn(2, 3, 8))
    assert fc.shape() == Shape(6, 8, 12, torch.float32, torch.float32, True, False, False, False)
    assert (proj.shape().sum_apart, proj.shape().update_apart, proj.shape().bias) == (True, True, False)


def test_dynamic_rows_are_rounded_up_and_dynamic_widths_are_unknown():
    model = onelora.adapt(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)))
    (update,) = updates(model, torch.randn(5, 8), dynamic=True)
    assert update.shape().rows == 8
    (update,) = updates(model, torch.randn(5, 8))
    assert update.shape().rows == 5


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
    assert update.shape() is None


def test_costs():
    """Ours moves g once more; beside attention it makes passes over x, y and g; the kernel makes none."""
    apart = dataclasses.replace(SHAPE, sum_apart=True, update_apart=True)
    costs = {name: (one.cost(SHAPE), one.cost(apart)) for name, one in LOWERINGS.items()}
    fused, alone = costs["producer_consumer"]
    assert fused.bytes == 4 * 512 * 1536 + 16 * 512
    assert alone.bytes - fused.bytes == 4 * 512 * (3 * 384 + 3 * 1536)
    assert costs["fused_kernel"][0] == costs["fused_kernel"][1]
    assert costs["fused_kernel"][0].bytes < fused.bytes
    assert costs["fused_kernel"][0].flops > fused.flops


# The choice


@pytest.fixture
def on_another_device():
    """An update on a device that is no CPU."""
    return updates(onelora.adapt(Block(device="meta")), torch.randn(2, 3, 8, device="meta"))[0]


def able(name):
    return Lowering(name, lambda update: None, None, None)


def unable(name):
    return Lowering(name, lambda update: f"no {name} today", None, None)


def never(*args):
    raise AssertionError("measured")


def test_the_rule_on_a_cpu():
    update = updates(onelora.adapt(Block()), torch.randn(2, 3, 8))[0]
    choice = choose(update, measure=never, lowerings={DEFAULT: able(DEFAULT), "other": able("other")})
    assert (choice.name, choice.why) == (DEFAULT, "the rule on a CPU")


@pytest.mark.parametrize(("other", "expected"), [(0.9e-3, "other"), (0.99e-3, DEFAULT), (2e-3, DEFAULT)])
def test_the_fastest_is_taken_if_it_wins_by_more_than_noise(on_another_device, other, expected):
    asked = []

    def measure(shape, names, device):
        asked.append((shape, list(names), device))
        return {DEFAULT: 1e-3, "other": other}

    lowerings = {DEFAULT: able(DEFAULT), "other": able("other"), "third": unable("third")}
    choice = choose(on_another_device, measure=measure, lowerings=lowerings)
    assert choice.name == expected
    assert choice.why == f"measured, microseconds: {DEFAULT} 1000, other {other * 1e6:.0f}"
    assert asked == [(on_another_device.shape(), [DEFAULT, "other"], "meta")]


def test_one_that_fails_is_not_taken_and_named(on_another_device):
    lowerings = {DEFAULT: able(DEFAULT), "other": able("other")}
    times = {DEFAULT: 1e-3, "other": float("inf")}
    choice = choose(on_another_device, measure=lambda *args: times, lowerings=lowerings)
    assert (choice.name, choice.why) == (DEFAULT, f"measured, microseconds: {DEFAULT} 1000, other failed")


def test_nothing_is_measured_where_there_is_no_choice(on_another_device):
    choice = choose(on_another_device, measure=never, lowerings={DEFAULT: able(DEFAULT), "other": unable("other")})
    assert (choice.name, choice.why) == (DEFAULT, "the only one (other: no other today)")


def test_a_forced_one_that_cannot(on_another_device):
    lowerings = {DEFAULT: able(DEFAULT), "other": unable("other")}
    choice = choose(on_another_device, "other", measure=never, lowerings=lowerings)
    assert (choice.name, choice.why) == (DEFAULT, "other: no other today")
    assert choose(on_another_device, DEFAULT, measure=never, lowerings=lowerings).why == "forced"


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
    assert "autocast" in why_not(update)

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
    picky = dataclasses.replace(
        real, name="picky", why_not=lambda update: None if update.shape().out_features == 12 else "not that wide"
    )
    monkeypatch.setitem(LOWERINGS, "picky", picky)
    model, x = fill_vectors(onelora.adapt(Block())), torch.randn(2, 3, 8)
    compiled = torch.compile(model, backend="onelora", options={"inner": "aot_eager", "lowering": "picky"})
    with pytest.warns(onelora.OneLoRAWarning, match=r"1 linears can't take it and get the default: 'proj': picky: not"):
        outputs = compiled(x)
    for actual, expected in zip(outputs, merged_copy(model)(x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_forced_default_says_nothing():
    model, x = fill_vectors(onelora.adapt(zoo.MLP())), torch.randn(2, 8)
    options = {"inner": "aot_eager", "lowering": "producer_consumer"}
    torch.testing.assert_close(torch.compile(model, backend="onelora", options=options)(x), model(x))


def test_run_passes_reports_the_skip():
    gm = captured(onelora.adapt(Block()), torch.randn(2, 3, 8))
    result = {one.name: one for one in run_passes(gm, lowering="fused_kernel")}["fuse_rank1"]
    assert result.rewrites == ["fc", "proj"] or result.rewrites == ["proj", "fc"]
    assert set(result.skips.values()) == {"fused_kernel: Triton needs a CUDA GPU"}
    assert not fuse_rank1(gm).modified


def test_explain_says_which_and_why():
    report = onelora.explain(onelora.adapt(zoo.MLP()), torch.randn(2, 8))
    assert {(site.lowering, site.why) for site in report.sites} == {("producer_consumer", "the rule on a CPU")}
    assert "producer_consumer: the rule on a CPU" in " ".join(str(report).split())


# Measurements on disk


@pytest.fixture
def clock():
    """Counts what it measures."""

    class Clock:
        asked: list = []

        def __call__(self, shape, name, device):
            self.asked.append((shape, name, device))
            return 1e-3 * len(name)

    Clock.asked = []
    return Clock()


NAMES = ["producer_consumer", "fused_kernel"]


def test_measured_once(tmp_path, clock):
    first = seconds(SHAPE, NAMES, "cpu", clock, tmp_path)
    assert first == {name: 1e-3 * len(name) for name in NAMES}
    assert seconds(SHAPE, NAMES, "cpu", never, tmp_path) == first
    assert len(clock.asked) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"rows": 513},
        {"dtype": torch.bfloat16},
        {"vector_dtype": torch.float64},
        {"bias": False},
        {"update_apart": True},
    ],
    ids=str,
)
def test_another_shape_is_measured_again(tmp_path, clock, other):
    seconds(SHAPE, NAMES, "cpu", clock, tmp_path)
    seconds(dataclasses.replace(SHAPE, **other), NAMES, "cpu", clock, tmp_path)
    assert len(clock.asked) == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_another_version_device_or_precision_is_measured_again(tmp_path, clock, monkeypatch):
    seconds(SHAPE, NAMES, "cpu", clock, tmp_path)
    seconds(SHAPE, NAMES, "meta", clock, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("onelora_compile.passes.lowerings.measured._versions", lambda: {"torch": "3.0"})
        seconds(SHAPE, NAMES, "cpu", clock, tmp_path)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        seconds(SHAPE, NAMES, "cpu", clock, tmp_path)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(clock.asked) == 8


def damages(text):
    yield ""
    yield text[: len(text) // 2]
    yield "[]"
    yield "null"
    yield json.dumps({"key": {}, "seconds": {name: 1.0 for name in NAMES}})
    for value in (float("nan"), 0, -1, "fast", None):
        yield json.dumps(json.loads(text) | {"seconds": dict.fromkeys(NAMES, value)})
    yield json.dumps(json.loads(text) | {"seconds": {NAMES[0]: 1.0}})
    yield "\x00\xff"


def test_a_damaged_file_is_measured_again_and_replaced(tmp_path, clock, caplog):
    caplog.set_level(logging.WARNING, "onelora_compile.lowerings")
    good = seconds(SHAPE, NAMES, "cpu", clock, tmp_path)
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    for number, damage in enumerate(damages(text), 1):
        file.write_text(damage, encoding="latin-1")
        assert seconds(SHAPE, NAMES, "cpu", clock, tmp_path) == good, damage
        assert file.read_text() == text
        assert len(clock.asked) == 2 + 2 * number
        assert len(caplog.records) == number


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, clock, caplog):
    caplog.set_level(logging.WARNING, "onelora_compile.lowerings")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert seconds(SHAPE, NAMES, "cpu", clock, blocked / "cache")[NAMES[0]] > 0
    assert "not kept" in caplog.text


@pytest.mark.parametrize(("error", "kept"), [(RuntimeError("PTX"), True), (torch.OutOfMemoryError("full"), False)])
def test_a_lowering_that_fails_does_not_stop_the_compilation(tmp_path, caplog, error, kept):
    caplog.set_level(logging.WARNING, "onelora_compile.lowerings")

    def measure(shape, name, device):
        if name == "fused_kernel":
            raise error
        return 1e-3

    expected = {"producer_consumer": 1e-3, "fused_kernel": float("inf")}
    assert seconds(SHAPE, NAMES, "cpu", measure, tmp_path) == expected
    assert f"lowering fused_kernel fails on cpu for {SHAPE}, and is not taken" in caplog.text
    assert len(list(tmp_path.iterdir())) == kept
    if kept:
        assert seconds(SHAPE, NAMES, "cpu", never, tmp_path) == expected


def test_concurrent_writers(tmp_path):
    """Readers see a whole file or none, whoever wrote it."""
    results, stop = [], threading.Barrier(8)

    def work(number):
        stop.wait()
        for _ in range(20):
            results.append(seconds(SHAPE, NAMES, "cpu", lambda *a: 1.0 + number, tmp_path))
            for file in tmp_path.glob("*.json"):
                file.unlink(missing_ok=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    assert all(one[NAMES[0]] == one[NAMES[1]] and one[NAMES[0]] in range(1, 9) for one in results)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_folder_follows_the_environment(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("ONELORA_CACHE_DIR", str(tmp_path / "own"))
    seconds(SHAPE, NAMES, "cpu", clock)
    assert len(list((tmp_path / "own").glob("*.json"))) == 1
