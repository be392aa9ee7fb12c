"""Rows: each row of the batch with an adapter of its own, against a merged copy for each."""

import copy
import random
import threading
import warnings

import pytest
import torch
import zoo
from counted_graphs import Counter, build
from test_named_adapters import Headed
from torch import nn
from torch.utils.checkpoint import checkpoint

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

WITHOUT_READS = ["in_proj_weight", "out_proj"]


def with_adapters(base, count, config=None, scale=0.05):
    """A model with adapters "0", "1", …, the first of them active, and the merged base of each in float64."""
    model = onelora.adapt(copy.deepcopy(base), config, adapter_name="0")
    for number in range(1, count):
        onelora.add_adapter(model, str(number))
    merged = []
    for number in range(count):
        onelora.set_adapter(model, str(number))
        merged.append(merged_copy(fill_vectors(model, scale, number), torch.float64).eval())
    return onelora.set_adapter(model, "0"), merged


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


def each_alone(merged, base, inputs, ids):
    """The rows one by one, each by its own merged model; of the base for -1."""
    out = []
    for row, number in enumerate(ids):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        one = {key: value.double() if value.is_floating_point() else value for key, value in one.items()}
        out.append(zoo.logits((merged[number] if number >= 0 else base)(**one)))
    return torch.cat(out)


@pytest.mark.parametrize("name", ["hf_vit", "llama", "bert", "gpt2", "tiny_vit"])
def test_mixed_batches_of_64_adapters_in_one_graph(name):
    base, inputs = zoo.MODELS[name]()
    model, merged = with_adapters(base, 64)
    wide, counter, order = copy.deepcopy(base).double(), Counter(), random.Random(0)
    fast = build(counter, model, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for turn in range(24):
            batch = order.randrange(2, 7)
            ids = [order.randrange(-1, 64) for _ in range(batch)]
            given = repeated(inputs, batch)
            plain = zoo.logits(base(**given))
            if turn % 4 == 0:
                onelora.set_adapter(model, str(order.randrange(64)))
            with onelora.rows(model, torch.tensor(ids)):
                for call in (fast, model):
                    assert_parity(
                        zoo.logits(call(**given)), each_alone(merged, wide, given, ids), plain, f"turn {turn}"
                    )
    assert len(counter.graphs) == 1


def test_inductor():
    base = zoo.MLP()
    model, merged = with_adapters(base, 3, scale=0.5)
    fast = torch.compile(model, backend="onelora", fullgraph=True)
    x = torch.randn(4, 8)
    with onelora.rows(model, ["2", None, "0", "1"]):
        out = fast(x)
    expected = each_alone(merged, copy.deepcopy(base).double(), {"x": x}, [2, -1, 0, 1])
    assert_parity(out, expected, base(x))


def test_threads_have_rows_of_their_own():
    base = zoo.MLP()
    model, merged = with_adapters(base, 8, scale=0.5)
    wide, failed = copy.deepcopy(base).double(), []

    def serve(seed):
        order = random.Random(seed)
        try:
            for _ in range(40):
                ids = [order.randrange(-1, 8) for _ in range(order.randrange(1, 6))]
                x = torch.randn(len(ids), 8)
                with torch.no_grad(), onelora.rows(model, ids):
                    out = model(x)
                expected = torch.cat(
                    [(merged[i] if i >= 0 else wide)(row[None].double()) for i, row in zip(ids, x, strict=True)]
                )
                assert_parity(out, expected, base(x))
                if seed == 0:
                    assert_parity(model(x), merged[0](x.double()), base(x))  # no block: the active one
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


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ("ab", onelora.ConfigError, "a list with the adapter"),
        ([1.0], onelora.ConfigError, "holds 1.0"),
        ([True], onelora.ConfigError, "holds True"),
        (torch.zeros(2, 1, dtype=torch.long), onelora.ConfigError, r"ids is \[2, 1\]"),
        (torch.zeros(2), onelora.ConfigError, "torch.float32"),
        ([0, 7], onelora.StateError, r"no adapter 7 .* '0' \(0\)"),
        (["fr"], onelora.StateError, "no adapter 'fr'"),
        ([-2], onelora.StateError, "no adapter -2"),
    ],
)
def test_ids_that_can_not_be_meant(ids, error, match):
    model, _ = with_adapters(zoo.MLP(), 2)
    with pytest.raises(error, match=match), onelora.rows(model, ids):
        pass


class Flattened(nn.Module):
    """Its second linear sees rows of tokens, as the routers of experts do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        return self.b(y.flatten(0, 1)).view(y.shape)


@pytest.mark.parametrize("compiled", [False, True])
def test_another_batch_is_an_error(compiled):
    for base, x in (
        (zoo.MLP(), torch.randn(3, 8)),
        (Flattened(), torch.randn(2, 5, 8)),
        (nn.Linear(4, 4), torch.randn(4)),
    ):
        model, _ = with_adapters(base, 2)
        run = torch.compile(model, backend="onelora", options={"inner": "eager"}) if compiled else model
        with onelora.rows(model, [0, 1]), pytest.raises(Exception, match="its first axis has to be the batch"):
            run(x)
        run(x)


def test_a_sequence_that_is_as_long_as_the_batch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
    config = onelora.OneLoRAConfig(exclude_modules=["self_attn.in_proj_weight", "self_attn.out_proj"])
    model, _ = with_adapters(layer, 2, config)
    with onelora.rows(model, [0, 1]):
        with pytest.raises(onelora.StateError, match="'self_attn' has batch_first=False"):
            model(torch.randn(2, 2, 8))
        with pytest.raises(onelora.StateError, match="first axis has to be the batch"):
            model(torch.randn(3, 2, 8))


def patches():
    config = onelora.OneLoRAConfig(target_modules=["0", "2"])
    return nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2), nn.Linear(4, 4)), torch.randn(2, 3, 4, 4), config, "'?0"


def packed():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return layer, torch.randn(2, 3, 8), None, "self_attn.in_proj_weight"


def experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return MixtralForCausalLM(config).eval(), torch.randint(0, 32, (2, 3)), None, "experts"


@pytest.mark.parametrize("make", [packed, experts, patches])
def test_what_has_no_rows_is_refused_by_name(make):
    base, x, config, name = make()
    model, _ = with_adapters(base.eval(), 3, config)
    for ids in ([0, 1], [1, 2], [0, -1], [1, 1]):
        with pytest.raises(onelora.StateError, match=f"(?s){name}.*no row for each adapter"), onelora.rows(model, ids):
            pass
    expected = zoo.logits(model(x))
    with onelora.rows(model, [0, 0]):  # the model's own: all that the block needs is there
        torch.testing.assert_close(zoo.logits(model(x)), expected)


def test_heads_have_no_rows():
    base = Headed().eval()
    config = onelora.OneLoRAConfig(target_modules=["a"], modules_to_save=["head"])
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), config, adapter_name="0"), 0.5)
    onelora.add_adapter(model, "1")
    x = torch.randn(2, 8)
    with onelora.rows(model, [0, 1]):
        out = model(x)  # the head is the base's for both
    expected = torch.stack([model(x)[0], base(x)[1]])
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    with pytest.raises(onelora.StateError, match=r"'head\.weight' was trained as a whole"), onelora.rows(model, [0, 1]):
        pass
    onelora.set_adapter(model, "1")
    for ids in ([0, 1], [0, 0], [-1, 0]):
        with pytest.raises(onelora.StateError, match=r"'head\.weight'"), onelora.rows(model, ids):
            pass
    with onelora.rows(model, [1, 1]):
        torch.testing.assert_close(model(x), base(x))


def test_nothing_is_exported_inside_a_block(tmp_path):
    model, _ = with_adapters(zoo.MLP(), 2)
    x = torch.randn(2, 8)
    from onelora_compile.exporters import export_onnx

    with onelora.rows(model, [0, 1]):
        for call in (
            lambda: export_onnx(model, (x,), tmp_path / "a.onnx"),
            lambda: onelora.save_adapter(model, tmp_path / "a.safetensors"),
            lambda: torch.export.export(model, (x,)),
            lambda: torch.jit.trace(model, (x,)),
            lambda: onelora.merge(model),
        ):
            with pytest.raises(onelora.StateError, match=r"onelora\.rows block"):
                call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(onelora.StateError, match="DataParallel"), onelora.rows(nn.DataParallel(model), [0, 1]):
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


def test_vmap_hides_the_batch():
    model, _ = with_adapters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 2)
    x = torch.randn(3, 3, 4)  # as many rows as each has tokens
    with onelora.rows(model, [1, 0, -1]), pytest.raises(onelora.StateError, match=r"inside torch\.func\.vmap"):
        torch.func.vmap(model)(x)
