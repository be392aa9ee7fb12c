"""Modules that other tools gave a class, and parameters that they compute, after adapt."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors


@pytest.mark.parametrize("how", ["parametrized", "normed", "pruned"])
def test_a_vector_that_is_computed_from_others_is_named(how, tmp_path):
    from torch.nn.utils import parametrizations, parametrize, prune

    base = zoo.MLP()
    model, layer = fill_vectors(onelora.adapt(base), 0.5), base.b
    onelora.add_adapter(model, "other")
    if how == "parametrized":
        parametrize.register_parametrization(layer, "onelora_vector", nn.Tanh())
    elif how == "normed":
        parametrizations.weight_norm(layer, "onelora_vector")
    else:
        prune.l1_unstructured(layer, "onelora_vector", 1)
    y = torch.randn(5, 6)

    def merged(dtype):
        vector: Any = layer.onelora_vector
        return y.to(dtype) @ (layer.weight.to(dtype) + vector.to(dtype).unsqueeze(1)).T + layer.bias.to(dtype)

    plain = merged(torch.float32)
    assert_parity(layer(y), merged(torch.float64), plain)
    asking: list[Callable[[nn.Module], Any]] = [onelora.vectors, onelora.merge, onelora.detach, onelora.adapters]
    asking += [lambda m: onelora.save_adapter(m, tmp_path / "a"), lambda m: onelora.set_adapter(m, "other")]
    asking += [lambda m: onelora.set_adapter(m, "default", scale=2), lambda m: onelora.rows(m, ["other"]).__enter__()]
    for asked in asking:
        with pytest.raises(onelora.StateError, match=r"'onelora_vector' of .*in_features.* is no parameter any more"):
            asked(model)
    model.double()
    assert_parity(layer(y.double()).float(), merged(torch.float64), plain)
    other = zoo.MLP().double()
    model.load_state_dict(other.state_dict(), strict=False)  # of the base's: what computes the vector stays
    assert torch.equal(layer.bias, other.b.bias)
    assert_parity(layer(y.double()).float(), merged(torch.float64), merged(torch.float32))


def test_a_module_that_another_tool_gave_a_class_is_not_broken():
    from torch.nn.utils import parametrizations, parametrize

    model, x = fill_vectors(onelora.adapt(zoo.MLP()), 0.5), torch.randn(5, 8)
    expected = model(x)
    parametrizations.weight_norm(model.b)
    with pytest.raises(onelora.StateError, match=r"'b' is a ParametrizedOneLoRALinear now.*undo that first"):
        onelora.detach(model)
    torch.testing.assert_close(model(x), expected)
    parametrize.remove_parametrizations(model.b, "weight")
    onelora.detach(model)
    assert type(model.b) is nn.Linear


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_layer_that_is_parametrized_since_is_saved_and_loaded(norm, tmp_path):
    def parametrized(model):
        torch.manual_seed(0)
        getattr(nn.utils.parametrizations, norm)(model.b)
        return model.eval()

    base, x = zoo.MLP(), torch.randn(5, 8)
    model = parametrized(fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.5))
    expected, own = model(x), parametrized(copy.deepcopy(base))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(model(x), expected)
    fill_vectors(model, 3.0, seed=9)
    onelora.load_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(onelora.load_adapter(own, tmp_path / "a.safetensors")(x), expected)
    other = zoo.MLP()
    with torch.no_grad():
        other.b.weight.add_(torch.randn_like(other.b.weight))
    with pytest.raises(onelora.BaseMismatchError):
        onelora.load_adapter(parametrized(other), tmp_path / "a.safetensors")


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_read_weight_that_a_parametrization_took_away_is_never_the_base(norm):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    model = fill_vectors(onelora.adapt(Reading()), 0.5)
    with pytest.raises(onelora.StateError, match=r"'w'.*is gone.*before adapt"):
        getattr(nn.utils.parametrizations, norm)(model, "w")
