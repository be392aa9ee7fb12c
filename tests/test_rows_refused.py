"""Rows that can't be meant, and what has none: named, and the model goes on as it was."""

import copy

import pytest
import torch
import zoo
from row_models import Headed, with_adapters
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


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


def test_vmap_hides_the_batch():
    model, _ = with_adapters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 2)
    x = torch.randn(3, 3, 4)  # as many rows as each has tokens
    with onelora.rows(model, [1, 0, -1]), pytest.raises(onelora.StateError, match=r"inside torch\.func\.vmap"):
        torch.func.vmap(model)(x)
