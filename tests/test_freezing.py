"""Inductor's `freezing` makes constants of the base alone: another adapter is seen, and one line adapts."""

import copy
import re

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x):
        return self.head(F.linear(torch.tanh(self.norm(self.fc(x))), self.w))


def other_values(model, seed):
    """As training or another adapter would give: vectors, a head, norms with their statistics."""
    fill_vectors(model, 0.3, seed)
    rng = torch.Generator().manual_seed(seed)
    vectors = {id(vector) for vector in onelora.vectors(model).values()}
    with torch.no_grad():
        for tensor in [*onelora.trainable_parameters(model), model.norm.running_mean, model.norm.running_var]:
            if id(tensor) not in vectors:
                tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)


def assert_right(compiled, model, x):
    assert_parity(compiled(x), merged_copy(model, torch.float64)(x.double()), merged_copy(model)(x))


@pytest.fixture
def frozen():
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "config", [{}, {"modules_to_save": ["head"], "train_norms": True}], ids=["vectors", "head and norms"]
)
def test_what_an_adapter_changes_is_no_constant(config, frozen, tmp_path):
    torch.manual_seed(0)
    base, x = Model().eval(), torch.randn(5, 8)
    model = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(**config))
    other_values(model, 1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    compiled = torch.compile(model, backend="onelora")
    for seed in range(2, 5):
        assert_right(compiled, model, x)
        other_values(model, seed)
    onelora.load_adapter(model, tmp_path / "a.safetensors")
    assert_right(compiled, model, x)
    with onelora.disabled(model):
        assert_parity(compiled(x), copy.deepcopy(base).double()(x.double()), base(x))
    onelora.add_adapter(model, "b", onelora.OneLoRAConfig(**config))
    onelora.set_adapter(model, "b")
    other_values(model, 7)
    assert_right(compiled, model, x)
    onelora.set_adapter(model, "default")
    assert_right(compiled, model, x)


@pytest.mark.filterwarnings("ignore:backend 'onelora' adapted:onelora_compile.OneLoRAWarning")
def test_one_line_adapts(frozen):
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(5, 8)
    compiled = torch.compile(model, backend="onelora")
    base = copy.deepcopy(model)
    assert_parity(compiled(x), copy.deepcopy(base).double()(x.double()), base(x))
    assert list(onelora.vectors(model)) == ["w", "fc", "head"]
    for seed in range(3):
        fill_vectors(model, 0.3, seed)
        assert_right(compiled, model, x)


def test_the_base_is_a_constant_as_without_vectors(frozen):
    x, constants = torch.randn(5, 8), []
    for model, backend in ((Model().eval(), "inductor"), (onelora.adapt(Model().eval()), "onelora")):
        _, (code,) = run_and_get_code(torch.compile(model, backend=backend), x)
        constants.append(len(set(re.findall(r"_frozen_param\d+", code))))
    assert constants[0] == constants[1] > 0
