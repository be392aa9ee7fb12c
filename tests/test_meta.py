"""Models on the meta device: shapes without numbers, and weights that come after adapt."""

import copy

import pytest
import torch
import zoo
from counted_graphs import Counter
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, perturb_norms

META = torch.device("meta")


def on_meta():
    with META:
        return nn.Sequential(nn.LayerNorm(8), zoo.MLP())


@pytest.mark.parametrize("how", ["eager", "compiled", "one line"])
@pytest.mark.filterwarnings("ignore:backend 'onelora' adapted")
def test_a_training_step_has_its_shapes(how):
    model, counter = on_meta(), Counter()
    if how != "one line":
        onelora.adapt(model)
    run = model if how == "eager" else torch.compile(model, backend="onelora", options={"inner": counter})
    for _ in range(2):
        y = run(torch.randn(5, 8, device=META))
        y.sum().backward()
    assert y.is_meta
    assert y.shape == zoo.MLP()(torch.randn(5, 8)).shape
    vectors = onelora.vectors(model).values()
    assert vectors
    assert all(v.grad is not None and v.grad.shape == v.shape for v in vectors)


def test_files_are_refused_where_the_base_has_no_numbers(tmp_path):
    base = nn.Sequential(nn.LayerNorm(8), zoo.MLP())
    file = tmp_path / "a.safetensors"
    onelora.save_adapter(fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.5), file)
    model = on_meta()
    with pytest.raises(onelora.StateError, match=r"meta device.*load the base's weights first"):
        onelora.load_adapter(model, file)
    assert not onelora.vectors(model)
    onelora.adapt(model)
    for adapter_name in (None, "second"):
        with pytest.raises(onelora.StateError, match=r"meta device.*load the base's weights first"):
            onelora.load_adapter(model, file, adapter_name=adapter_name)
    with pytest.raises(onelora.StateError, match=r"meta device.*load the base's weights first"):
        onelora.save_adapter(model, tmp_path / "b.safetensors")
    assert list(tmp_path.iterdir()) == [file]
    model.load_state_dict(base.state_dict(), assign=True)
    x = torch.randn(5, 8)
    assert torch.equal(onelora.load_adapter(model, file)(x), onelora.load_adapter(base, file)(x))


def test_a_whole_state_with_zero_vectors_is_the_base():
    """As set_model_state_dict of torch.distributed fills it up with what the model has."""
    base, x = perturb_norms(nn.Sequential(nn.LayerNorm(8), zoo.MLP())), torch.randn(5, 8)
    model = onelora.adapt(on_meta(), onelora.OneLoRAConfig(train_norms=True)).to_empty(device="cpu")
    model.load_state_dict(model.state_dict() | base.state_dict())
    fill_vectors(model, 0.5)
    perturb_norms(model, seed=1)
    model.load_state_dict(model.state_dict())  # a trained one
    with onelora.disabled(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(onelora.detach(model)(x), base(x))


def test_trained_norms_whose_base_was_never_there_are_said_to_be_unknown(tmp_path):
    config = onelora.OneLoRAConfig(train_norms=True)
    trained = fill_vectors(onelora.adapt(nn.Sequential(nn.LayerNorm(8), zoo.MLP()), config), 0.5)
    checkpoint = copy.deepcopy(trained.state_dict())
    model = onelora.adapt(on_meta(), config)
    model.load_state_dict(checkpoint, assign=True)
    x = torch.randn(5, 8)
    assert torch.equal(model(x), trained(x))
    for call in (
        lambda: onelora.detach(model),
        lambda: onelora.disabled(model).__enter__(),
        lambda: onelora.set_adapter(onelora.add_adapter(model, "other"), "other"),
        lambda: onelora.save_adapter(model, tmp_path / "a.safetensors"),
    ):
        with pytest.raises(onelora.StateError, match=r"base's weights"):
            call()
    model.load_state_dict({name: value for name, value in checkpoint.items() if "onelora" not in name})
    model.load_state_dict(checkpoint)
    assert torch.equal(onelora.detach(model)(x), onelora.detach(trained)(x))
