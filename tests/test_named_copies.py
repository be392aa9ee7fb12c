"""A model with several adapters as a whole: its copies, merge, blocks, size, and sums of what it has."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import zoo
from row_models import Headed

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def stored(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, stored])
def test_a_copy_has_adapters_of_its_own(duplicate):
    model = fill_vectors(onelora.adapt(zoo.MLP(), adapter_name="one"), 0.5)
    onelora.add_adapter(model, "two")
    x = torch.randn(2, 8)
    with onelora.rows(model, [0, 1]):
        mixed = model(x)
    other = duplicate(model)
    assert onelora.adapters(other) == onelora.adapters(model)
    with onelora.rows(other, [0, 1]):
        assert torch.equal(other(x), mixed)
        assert torch.equal(model(x), onelora.set_adapter(copy.deepcopy(model), "one")(x))  # the block is not its own
    onelora.set_adapter(fill_vectors(other, 0.7, seed=3), "two")
    fill_vectors(other, 0.9, seed=4)
    with onelora.rows(model, [0, 1]):
        assert torch.equal(model(x), mixed)


def test_merge_is_of_the_active_adapter():
    model = fill_vectors(onelora.adapt(zoo.MLP().double(), adapter_name="one"), 0.5)
    onelora.add_adapter(model, "two")
    x = torch.randn(2, 8).double()
    expected = onelora.set_adapter(fill_vectors(model, 0.3), "one")(x)
    onelora.merge(model)
    torch.testing.assert_close(model(x), expected)
    assert onelora.adapters(model) == {}


def test_inside_blocks_nothing_is_switched():
    model = onelora.adapt(zoo.MLP(), adapter_name="one")
    onelora.add_adapter(model, "two")
    calls = [
        lambda: onelora.set_adapter(model, "two"),
        lambda: onelora.delete_adapter(model, "two"),
        lambda: onelora.add_adapter(model, "three"),
    ]
    for block in (onelora.disabled(model), onelora.rows(model, ["two"])):
        with block:
            for call in calls:
                with pytest.raises(onelora.StateError, match="inside a onelora"):
                    call()
    assert list(onelora.adapters(model)) == ["one", "two"]


def test_1000_adapters_take_what_their_numbers_take():
    model: Any = onelora.adapt(zoo.MLP())
    for number in range(1000):
        onelora.add_adapter(model, str(number))
    values = model._onelora_state.pool.values
    # 20 numbers, which three vectors of 6, 7 and 7 fill up to 24; the table grows by halves.
    assert values.nbytes <= 4 * 24 * 1002 * 1.5


@pytest.mark.parametrize("kind", [zoo.MLP, Headed])
def test_a_sum_of_adapters_of_the_model(kind, tmp_path):
    """By names as by files, for any weights; the one that is active and scaled counts as itself."""
    base = kind().double().eval()
    config = onelora.OneLoRAConfig(train_norms=True) if kind is Headed else None
    model = onelora.adapt(copy.deepcopy(base), config, adapter_name="a")
    for seed, name in enumerate("abc"):
        if seed:
            onelora.add_adapter(model, name)
            onelora.set_adapter(model, name)
        with torch.no_grad():
            for parameter in onelora.trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        onelora.save_adapter(model, tmp_path / name)
    onelora.set_adapter(model, "b", scale=0.5)
    weights = {"a": 0.7, "b": -0.3, "c": 2.0}
    made = onelora.combine(weights, tmp_path / "d", model=model, adapter_name="mix", trained="add")
    files = {tmp_path / name: weight for name, weight in weights.items()}
    expected = onelora.combine(files, trained="add", base=base.state_dict())
    for found in (made, onelora.read_adapter(tmp_path / "d")):
        for key, value in expected.tensors.items():
            assert torch.equal(found.tensors[key], value), key
    onelora.set_adapter(model, "mix")
    for name, vector in onelora.vectors(model).items():
        assert torch.equal(vector.float(), expected.vectors[name])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.saved.items())
    with pytest.raises(onelora.StateError, match="no adapter 'fr'"):
        onelora.combine({"fr": 1.0}, model=model, adapter_name="x")
    with pytest.raises(onelora.ConfigError, match="give model= too"):
        onelora.combine({"a": 1.0}, adapter_name="x")
    if kind is Headed:
        with pytest.raises(onelora.ConfigError, match="trained"):
            onelora.combine({"a": 0.5}, model=model, adapter_name="x")
    assert "x" not in onelora.adapters(model)
