"""Rows: each row of the batch with an adapter of its own, against a merged copy for each."""

import copy
import random
import threading
import warnings

import pytest
import torch
import zoo
from counted_graphs import Counter, build
from row_models import Alone, with_adapters
from torch import nn
from torch.utils.checkpoint import checkpoint

import onelora_compile as onelora

WITHOUT_READS = ["in_proj_weight", "out_proj"]


def repeated(inputs, batch):
    """Inputs of another batch size, every row another one."""
    torch.manual_seed(batch)
    made = {}
    for key, value in inputs.items():
        rows = value[torch.arange(batch) % len(value)].clone()
        if rows.is_floating_point():
            rows = torch.randn_like(rows)
        elif key == "input_ids":
            rows = rows.flatten()[torch.randperm(rows.numel())].view(rows.shape)
        made[key] = rows
    return made


@pytest.mark.parametrize("name", ["hf_vit", "llama", "bert", "gpt2", "tiny_vit"])
def test_mixed_batches_of_64_adapters_in_one_graph(name):
    base, inputs = zoo.MODELS[name]()
    model, merged = with_adapters(base, 64)
    alone, counter, order = Alone(merged, base), Counter(), random.Random(0)
    fast = build(counter, model, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for turn in range(24):
            batch = order.randrange(2, 7)
            ids = [order.randrange(-1, 64) for _ in range(batch)]
            given = repeated(inputs, batch)
            if turn % 4 == 0:
                onelora.set_adapter(model, str(order.randrange(64)))
            with onelora.rows(model, torch.tensor(ids)):
                for call in (fast, model):
                    alone.check(zoo.logits(call(**given)), given, ids, f"turn {turn}")
    assert len(counter.graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_vit", "llama"])
def test_256_switches_and_mixed_batches_of_64_adapters(name):
    """In any order: one graph for blocks and one without."""
    base, inputs = zoo.MODELS[name]()
    model, merged = with_adapters(base, 64)
    alone, counter, order, active = Alone(merged, base), Counter(), random.Random(0), 0
    fast = build(counter, model, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for turn in range(256):
            batch = order.randrange(2, 7)
            given = repeated(inputs, batch)
            ids = [order.randrange(-1, 64) for _ in range(batch)] if order.random() < 0.5 else None
            if ids is None:
                active = order.randrange(64)
                onelora.set_adapter(model, str(active))
                found = zoo.logits(fast(**given))
            else:
                with onelora.rows(model, ids):
                    found = zoo.logits(fast(**given))
            alone.check(found, given, ids or [active] * batch, f"turn {turn}")
    assert len(counter.graphs) == 2


def test_inductor():
    base = zoo.MLP()
    model, merged = with_adapters(base, 3, scale=0.5)
    fast = torch.compile(model, backend="onelora", fullgraph=True)
    x = torch.randn(4, 8)
    with onelora.rows(model, ["2", None, "0", "1"]):
        out = fast(x)
    Alone(merged, base).check(out, {"x": x}, [2, -1, 0, 1])


@pytest.mark.parametrize("compiled", [True, False])
def test_threads_have_rows_of_their_own(compiled):
    base = zoo.MLP()
    model, merged = with_adapters(base, 8, scale=0.5)
    alone, failed, counter = Alone(merged, base), [], Counter()
    run = build(counter, model, dynamic=True) if compiled else model
    with torch.no_grad():
        run(torch.randn(3, 8))
        with onelora.rows(model, [0, 1, 2]):
            run(torch.randn(3, 8))

    def serve(seed):
        order, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
        try:
            for _ in range(40):
                ids = [order.randrange(-1, 8) for _ in range(order.randrange(2, 6))]
                x = torch.randn(len(ids), 8, generator=numbers)
                with torch.no_grad(), onelora.rows(model, ids):
                    out = run(x)
                alone.check(out, {"x": x}, ids)
                if seed == 0:
                    with torch.no_grad():
                        alone.check(run(x), {"x": x}, [0] * len(ids))  # no block: the active one
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for number in range(8, 24):  # hot: beside them
        onelora.add_adapter(model, str(number))
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    # Without a block, with one, without one while other threads have theirs; these may begin while it is captured,
    # and Dynamo captures the same once more.
    assert len({graph.code for graph in counter.graphs}) <= 3
    assert len(counter.graphs) <= 4


def test_what_a_block_uses_stays_as_it_is():
    """Other threads can add adapters, and touch what the block does not use."""
    model, _ = with_adapters(zoo.MLP(), 3)
    refused = []

    def meddle():
        onelora.add_adapter(model, "new")
        onelora.delete_adapter(model, "2")
        for call in (lambda: onelora.delete_adapter(model, "1"), lambda: onelora.set_adapter(model, "1")):
            with pytest.raises(onelora.StateError, match="block of the model is open that uses it"):
                call()
            refused.append(call)

    x = torch.randn(2, 8)
    with onelora.rows(model, ["1", "0"]):
        before = model(x)
        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join()
        assert torch.equal(model(x), before)
    assert len(refused) == 2
    onelora.set_adapter(model, "1")


def test_blocks_nest_and_end():
    model, merged = with_adapters(zoo.MLP(), 3, scale=0.5)
    x = torch.randn(1, 8)

    def is_of(number):
        torch.testing.assert_close(model(x).double(), merged[number](x.double()), rtol=1e-5, atol=1e-5)

    with onelora.rows(model, [1]):
        is_of(1)
        with onelora.rows(model, ["2"]):
            is_of(2)
        with pytest.raises(RuntimeError, match="mine"), onelora.rows(model, ["2"]):
            raise RuntimeError("mine")
        is_of(1)
        with onelora.disabled(model):
            base = model(x)
        is_of(1)
    is_of(0)
    with onelora.disabled(model):
        assert torch.equal(model(x), base)
        with pytest.raises(onelora.StateError, match=r"inside a onelora\.disabled block"), onelora.rows(model, [1]):
            pass


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_a_checkpoint_runs_again_with_the_same_rows():
    inner = zoo.MLP().double()
    model, _ = with_adapters(Checkpointed(inner), 3, scale=0.5)
    x = torch.randn(2, 8).double().requires_grad_()
    plain = copy.deepcopy(model)
    plain.forward = plain.inner.forward
    with onelora.rows(plain, [1, 0]):
        expected = torch.autograd.grad(plain.inner(x).sin().sum(), x)
    with onelora.rows(model, [1, 0]):
        out = model(x)
        torch.testing.assert_close(torch.autograd.grad(model(x).sin().sum(), x), expected)
    with pytest.raises(onelora.StateError, match="call backward inside the block"):
        out.sin().sum().backward()


def test_training_rows_warns_of_no_dead_vectors():
    model, _ = with_adapters(zoo.MLP(), 2)
    onelora.row_parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with onelora.rows(model, [1, 1]):
            model(torch.randn(2, 8)).sum().backward()
