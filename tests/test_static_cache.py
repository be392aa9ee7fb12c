"""Generation with a static cache: compiled once, for every token and every adapter."""

import copy
from typing import Any

import pytest
import torch
import transformers
from generating import CONFIGS, PROMPT, TOKENS, base_in, greedy

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy

ENDS, SEED = [2], 1


def by_config(model, **how):
    """Transformers compiles the decoding; on a CPU only where it is told to."""
    config: Any = transformers.CompileConfig(**{"mode": None} | how)
    config._compile_all_devices = True
    return {"compile_config": config}


def in_place(model, **how):
    """The prompt is compiled, too."""
    model.compile(**how)
    return {}


def by_forward(model, **how):
    model.forward = torch.compile(model.forward, **how)
    return {}


WAYS = [by_config, in_place, by_forward]


def generated(model, how):
    given = torch.tensor([PROMPT])
    more = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False, "cache_implementation": "static"}
    tokens = model.generate(given, attention_mask=torch.ones_like(given), **more, **how)
    return tokens[0, len(PROMPT) :].tolist()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graphs_of(base, way):
    """How many graphs plain PyTorch captures of a base that generates twice."""
    twin, before = copy.deepcopy(base), graphs()
    how = way(twin, backend="eager")
    for _ in range(2):
        generated(twin, how)
    torch.compiler.reset()
    return graphs() - before


def adapters(base, folder):
    """Two files, and what eager generates in float64 of each, of the first one negated and of the base."""
    expected = {"base": greedy(copy.deepcopy(base).double(), ENDS)}
    for seed, name in enumerate(("a", "b"), SEED):
        model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.02, seed)
        onelora.save_adapter(model, folder / f"{name}.safetensors")
        expected[name] = greedy(merged_copy(model, torch.float64), ENDS)
    negated = fill_vectors(onelora.adapt(copy.deepcopy(base)), -0.02, SEED)
    expected["negated"] = greedy(merged_copy(negated, torch.float64), ENDS)
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    return expected


def swapped(model, how, folder):
    """What the model generates while its adapters are loaded, switched, scaled and disabled."""
    for name in ("a", "b"):
        onelora.load_adapter(model, folder / f"{name}.safetensors", adapter_name=name)
    found = {}
    for name, adapter, scale in (("b", "b", 1.0), ("negated", "a", -1.0), ("a", "a", 1.0)):
        onelora.set_adapter(model, adapter, scale=scale)
        found[name] = generated(model, how)
    with onelora.disabled(model):
        found["base"] = generated(model, how)
    onelora.load_adapter(model, folder / "b.safetensors", adapter_name="a")  # a later training of the same
    assert generated(model, how) == found["b"]
    return found


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("way", WAYS)
def test_an_adapted_model(kind, way, tmp_path):
    base = base_in(tmp_path, kind)
    allowed, expected = graphs_of(base, way), adapters(base, tmp_path)
    model, before = onelora.adapt(base), graphs()
    how = way(model, backend="onelora", options={"inner": "eager"})
    assert generated(model, how) == expected["base"]
    assert swapped(model, how, tmp_path) == expected
    assert graphs() - before == allowed > 0


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("way", WAYS)
def test_one_line(kind, way, tmp_path):
    base = base_in(tmp_path, kind)
    allowed, expected = graphs_of(base, way), adapters(base, tmp_path)
    before = graphs()
    how = way(base, backend="onelora", options={"inner": "eager"})
    with pytest.warns(onelora.OneLoRAWarning, match="adapted 14 linears"):
        assert generated(base, how) == expected["base"]
    assert swapped(base, how, tmp_path) == expected
    assert 0 < graphs() - before <= allowed + 1  # the first call's


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way"), [("llama", by_config), ("qwen3", in_place), ("gemma2", by_config)])
def test_by_inductor(kind, way, tmp_path):
    base = base_in(tmp_path, kind)
    allowed, expected = graphs_of(base, way), adapters(base, tmp_path)
    model, before = onelora.adapt(base), graphs()
    how = way(model, backend="onelora", mode="reduce-overhead")  # what transformers takes unless told
    assert generated(model, how) == expected["base"]
    assert swapped(model, how, tmp_path) == expected
    assert graphs() - before == allowed > 0
