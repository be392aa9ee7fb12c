"""Layers that are moved, replaced or taken out after `adapt`: names are all that a waiting adapter knows them by."""

import copy
import io

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


class Layers(nn.Module):
    """Equal layers in a row, so that any of them can take the place of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def turned(model):
    model.layers = nn.ModuleList(reversed(model.layers))


def cut(model):
    del model.layers[0]


def replaced(model):
    model.layers[1] = nn.Linear(6, 6)


def rows(model, folder):
    with onelora.rows(model, ["default", "b"]):
        model(torch.randn(2, 6))


CALLS = {
    "adapters": lambda model, folder: onelora.adapters(model),
    "add": lambda model, folder: onelora.add_adapter(model, "c"),
    "combine": lambda model, folder: onelora.combine({"default": 1, "b": 1}, model=model, adapter_name="c"),
    "rows": rows,
    "save": lambda model, folder: onelora.save_adapter(model, folder / "b.safetensors", adapter_name="b"),
    "set": lambda model, folder: onelora.set_adapter(model, "default"),
    "train rows": lambda model, folder: onelora.row_parameters(model),
}


def check(model, x):
    oracle = merged_copy(model, torch.float64)(x.double())
    assert_parity(model(x), oracle, merged_copy(model)(x))


@pytest.mark.filterwarnings("ignore:.* was given 3 vectors and has 2")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("change", [turned, cut, replaced])
def test_adapters_that_wait_are_not_given_to_other_layers(change, name, tmp_path):
    model, x = fill_vectors(onelora.adapt(Layers()), 0.5), torch.randn(4, 6)
    first = model(x)
    onelora.add_adapter(model, "b")
    fill_vectors(onelora.set_adapter(model, "b"), 0.5, 1)
    second, layers = model(x), nn.ModuleList(model.layers)
    change(model)
    changed = model(x)
    with pytest.raises(onelora.StateError, match=r"default, b, and layers\.\d.*moved, replaced or taken out"):
        CALLS[name](model, tmp_path)
    assert not any(tmp_path.iterdir())
    assert torch.equal(model(x), changed)
    model.layers = layers
    assert torch.equal(model(x), second)
    assert torch.equal(onelora.set_adapter(model, "default")(x), first)
    assert torch.equal(onelora.set_adapter(model, "b")(x), second)


def saved_whole(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_new_layer_with_a_vector_takes_the_place_of_the_lost_one():
    model = fill_vectors(onelora.adapt(Layers()), 0.5)
    replaced(model)
    with pytest.warns(onelora.OneLoRAWarning, match=r"given 3 vectors and has 2.*no layer layers\.1 has one"):
        onelora.add_adapter(model, "b", onelora.OneLoRAConfig())
    onelora.summary(model)  # a warning is an error here
    onelora.delete_adapter(model, "b")
    replaced(model)
    with pytest.warns(onelora.OneLoRAWarning, match=r"given 3 vectors and has 2.*no layer layers\.1 has one"):
        onelora.summary(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_whole])
@pytest.mark.parametrize("change", [turned, cut, replaced])
def test_a_copy_knows_the_layers_of_its_adapters(change, copied):
    model = fill_vectors(onelora.adapt(Layers()), 0.5)
    onelora.add_adapter(model, "b")
    other = copied(model)
    change(other)
    with pytest.raises(onelora.StateError, match=r"default, b, and layers\.\d.*moved, replaced or taken out"):
        onelora.set_adapter(other, "b")
    onelora.set_adapter(model, "b")  # its layers are where they were


@pytest.mark.filterwarnings("ignore:.* was given 3 vectors and has 2")
@pytest.mark.parametrize("seen", [True, False], ids=["listed before", "not listed"])
@pytest.mark.parametrize("change", [turned, cut, replaced])
def test_one_adapter_is_that_of_its_layers(change, seen):
    model, x = fill_vectors(onelora.adapt(Layers()), 0.5), torch.randn(4, 6)
    if seen:
        onelora.adapters(model)
        onelora.delete_adapter(onelora.add_adapter(model, "gone"), "gone")
    change(model)
    check(model, x)
    first = model(x)
    names = set(onelora.vectors(model))
    assert set(onelora.adapters(model)["default"].vectors) == names
    onelora.add_adapter(model, "b")
    fill_vectors(onelora.set_adapter(model, "b"), 0.5, 1)
    check(model, x)
    assert torch.equal(onelora.set_adapter(model, "default")(x), first)


def disabled(model):
    with onelora.disabled(model):
        model(torch.randn(4, 6))


def switched(model):
    onelora.set_adapter(model, "b")


@pytest.mark.parametrize("call", [onelora.detach, disabled, switched])
def test_a_batch_norm_that_is_gone_is_named(call):
    """As tools leave a model that fold batch norms into what is before them."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    fill_vectors(onelora.adapt(model), 0.5)
    onelora.add_adapter(model, "b")
    before = copy.deepcopy(model.state_dict())
    model[1] = nn.Identity()
    with pytest.raises(onelora.StateError, match=r"1\.running_mean.*removed or replaced after adapt"):
        call(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(4, 6)
    expected = model(x)
    onelora.merge(model)
    torch.testing.assert_close(model(x), expected)


def new_norm(model):
    model[1] = nn.LayerNorm(6)


def turned_norms(model):
    model[1], model[3] = model[3], model[1]


@pytest.mark.parametrize("change", [new_norm, turned_norms])
def test_a_switch_after_norms_were_moved_writes_by_their_names(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6))
    onelora.adapt(model, onelora.OneLoRAConfig(train_norms=True), adapter_name="a")
    onelora.add_adapter(model, "b")
    for value, name in enumerate("ab", 1):
        onelora.set_adapter(model, name)
        nn.init.constant_(model.get_parameter("1.weight"), value)
    change(model)
    onelora.set_adapter(model, "a")
    assert model.get_parameter("1.weight").unique().tolist() == model.get_parameter("3.weight").unique().tolist() == [1]
    nn.init.constant_(model.get_parameter("1.weight"), 3)
    onelora.set_adapter(model, "b")
    onelora.set_adapter(model, "a")
    assert model.get_parameter("1.weight").unique().tolist() == [3]
