"""CUDA graphs (`mode="reduce-overhead"`) know a model's tensors by their addresses: what changes values keeps these."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

x = torch.randn(3, 8)


@pytest.fixture
def model():
    layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
    config = onelora.OneLoRAConfig(target_modules=["0"], modules_to_save=["2"], train_norms=True)
    return fill_vectors(onelora.adapt(nn.Sequential(*layers), config), 0.5).eval()


def addresses(model):
    """Of all that a graph reads."""
    return {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()} | {
        f"read {name}": tensor.data_ptr()
        for module in model.modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def inside(model):
    with onelora.disabled(model):
        return addresses(model), model(x)


def test_other_values_keep_all_addresses(model, tmp_path):
    before = addresses(model)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    onelora.load_adapter(model, tmp_path / "a.safetensors")
    assert addresses(model) == before
    onelora.load_adapter(model, tmp_path / "a.safetensors", adapter_name="b")
    for name in ("b", "default", "b"):
        onelora.set_adapter(model, name)
        assert addresses(model) == before
    inside(model)
    assert addresses(model) == before


def test_every_disabled_block_has_the_addresses_of_the_first(model):
    base = onelora.detach(copy.deepcopy(model))
    first, y = inside(model)
    assert torch.equal(y, base(x))
    taken = [torch.zeros(size) for size in (4, 8, 16, 64, 128)]  # memory that the block may have left
    with torch.no_grad():  # training goes on
        for parameter in onelora.trainable_parameters(model):
            parameter.add_(1)
    assert inside(model)[0] == first
    assert torch.equal(inside(model)[1], base(x))
    assert len(taken) == 5


def test_what_was_written_to_inside_a_block_is_not_there_in_the_next(model):
    base = onelora.detach(copy.deepcopy(model))
    model.train()
    inside(model)  # moves the statistics of the norm
    model.eval()
    assert torch.equal(inside(model)[1], base(x))
    with onelora.disabled(model):
        model.bfloat16()
    model.float()
    with onelora.disabled(model):
        assert torch.equal(model[2].weight, base[2].weight)  # kept from before training, in float32


def test_another_base_in_the_same_tensors_is_the_base_of_its_own_blocks():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    config = onelora.OneLoRAConfig(target_modules=["0"], modules_to_save=["1"])
    inside(onelora.adapt(model, config))
    onelora.detach(model)
    with torch.no_grad():
        model.get_parameter("1.weight").add_(1)
    base = copy.deepcopy(model)
    fill_vectors(onelora.adapt(model, config), 0.5)
    assert torch.equal(inside(model)[1], base(x))


def test_gradients_of_one_block_do_not_reach_the_next(model):
    for _ in range(2):
        with onelora.disabled(model):
            model(x).sum().backward()
            held = [parameter.grad for parameter in model[2].parameters()]
    assert all(grad is not None and (grad == 3).all() for grad in held[1:])


def test_nothing_is_kept_of_a_model_that_is_gone():
    model = onelora.adapt(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)))
    with onelora.disabled(model):
        stand_ins = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(one() is not None for one in stand_ins)
