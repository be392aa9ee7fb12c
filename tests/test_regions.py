"""Repeated blocks that are compiled one by one: one graph for all of them, with vectors of their own."""

import warnings

import pytest
import torch
from accelerate.utils import compile_regions
from counted_graphs import Counter
from torch import nn

import onelora_compile as onelora
from onelora_compile.dynamo.private_api import in_eager
from onelora_compile.testing import fill_vectors, merged_copy, perturb_norms

x = torch.randn(3, 8)


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def the_class(model, monkeypatch, **how):
    monkeypatch.setattr(Block, "forward", torch.compile(Block.forward, **how))
    return model


def each_block(model, monkeypatch, **how):
    for block in model.blocks:
        block.compile(**how)
    return model


def of_accelerate(model, monkeypatch, **how):
    return compile_regions(model, **how)


# accelerate compiles what is around the blocks too.
@pytest.mark.parametrize(("region", "graphs"), [(the_class, 1), (each_block, 1), (of_accelerate, 3)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_six_blocks_are_one_graph(region, graphs, dynamic, monkeypatch):
    counter = Counter()
    model = fill_vectors(onelora.adapt(perturb_norms(Model())), 0.2)
    options = {"backend": "onelora", "options": {"inner": counter}, "dynamic": dynamic, "fullgraph": True}
    run = region(model, monkeypatch, **options)
    for given in [x, torch.randn(5, 8), torch.randn(7, 8)] if dynamic else [x]:
        torch.testing.assert_close(run(given), eager(merged_copy(model), given))
    assert len(counter.graphs) == graphs
    run(x).square().sum().backward()
    merged = merged_copy(model).requires_grad_(True)
    eager(merged, x).square().sum().backward()
    for name, vector in onelora.vectors(model).items():
        of_weight = merged.get_parameter(f"{name}.weight").grad
        assert of_weight is not None
        right = of_weight.sum(1)
        torch.testing.assert_close(vector.grad, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())
    fill_vectors(model, 0.2, seed=1)
    torch.testing.assert_close(run(x), eager(merged_copy(model), x))
    with onelora.disabled(model):
        torch.testing.assert_close(run(x), eager(base_of(model), x))
    assert len(counter.graphs) == graphs


def eager(model, x):
    """The class of its blocks may be compiled."""
    with in_eager():
        return model(x)


def base_of(model):
    twin = Model()
    twin.load_state_dict({n: p for n, p in model.state_dict().items() if "onelora" not in n})
    return twin


@pytest.mark.parametrize("region", [the_class, each_block, of_accelerate])
@pytest.mark.parametrize("end", ["detach", "merge"])
def test_blocks_of_a_model_that_lost_its_vectors_are_not_adapted_by_themselves(region, end, monkeypatch):
    counter, flags = Counter(), [True] * len(list(Model().parameters()))
    model = fill_vectors(onelora.adapt(Model()), 0.2)
    expected = eager(merged_copy(model) if end == "merge" else base_of(model), x)
    run = region(model, monkeypatch, backend="onelora", options={"inner": counter})
    run(x)
    getattr(onelora, end)(model)
    counter.graphs.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", onelora.OneLoRAWarning)
        torch.testing.assert_close(run(x), expected)
    assert onelora.vectors(model) == {}
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert len(counter.graphs) == 1  # of all blocks; PyTorch leaves alone what is an nn.Linear of its own by now
    fresh = Model()
    with pytest.warns(onelora.OneLoRAWarning, match="adapted"):
        region(fresh, monkeypatch, backend="onelora", options={"inner": counter})(x)
    assert onelora.vectors(fresh)


def test_blocks_without_a_vector_are_not_adapted_against_the_choice(monkeypatch):
    model = onelora.adapt(Model(), onelora.OneLoRAConfig(target_modules=[r"blocks.0.up"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", onelora.OneLoRAWarning)
        each_block(model, monkeypatch, backend="onelora", options={"inner": Counter()})(x)
    assert list(onelora.vectors(model)) == ["blocks.0.up"]
