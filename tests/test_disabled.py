"""`disabled`: a block in which the model is the base, and what may be done inside it."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors


def test_disabled_does_not_disturb_a_pending_backward():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(5, 8)
    expected = torch.autograd.grad(model(x).sum(), list(onelora.vectors(model).values()))
    out = model(x)
    with onelora.disabled(model), torch.no_grad():
        base = model(x)
    assert not torch.allclose(base, out)
    actual = torch.autograd.grad(out.sum(), list(onelora.vectors(model).values()))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_forward_that_they_come_from(compiled):
    """Whether forward and backward are inside or outside of the block, in any mix, as PEFT has it."""
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    base = onelora.detach(copy.deepcopy(model))
    run = torch.compile(model, backend="onelora", options={"inner": "aot_eager"}) if compiled else model
    x = torch.randn(5, 8, requires_grad=True)
    vectors = list(onelora.vectors(model).values())

    def gradients(loss):
        return torch.autograd.grad(loss, [x, *vectors], allow_unused=True)

    adapted, of_base = gradients(model(x).sin().sum()), torch.autograd.grad(base(x).sin().sum(), x)[0]
    out = run(x)
    with onelora.disabled(model):
        inside = run(x)
        for got, expected in zip(gradients(out.sin().sum()), adapted, strict=True):
            torch.testing.assert_close(got, expected)
    got = gradients(inside.sin().sum())
    torch.testing.assert_close(got[0], of_base)
    assert got[1:] == (None,) * len(vectors)
    # As in preference optimisation: the base is the reference of a loss on the adapted model.
    expected = gradients((model(x) - base(x.detach())).pow(2).sum())
    out = run(x)
    with onelora.disabled(model):
        reference = run(x.detach())
    for got, one in zip(gradients((out - reference).pow(2).sum()), expected, strict=True):
        torch.testing.assert_close(got, one)


def test_what_is_done_to_the_adapter_inside_a_block_lasts():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(onelora.trainable_parameters(model), lr=1.0)
    model(torch.randn(5, 8)).sum().backward()
    with onelora.disabled(model):
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        assert list(saved) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in saved.items())
        assert onelora.vectors(model)["a"] is onelora.trainable_parameters(model)[0]
        optimizer.step()
    after = model.state_dict()
    assert not torch.equal(after["a.onelora_vector"], before["a.onelora_vector"])
    with onelora.disabled(model):
        for module in (model, model.a, nn.Sequential(model)):
            with pytest.raises(onelora.StateError, match="load a state_dict inside"):
                module.load_state_dict(module.state_dict())
        for call in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
            with pytest.raises(onelora.StateError, match="copy or pickle"):
                call(model)
        model.double()
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}
    assert torch.equal(model.get_parameter("a.onelora_vector"), after["a.onelora_vector"].double())
    model.load_state_dict(before)
    assert torch.equal(copy.deepcopy(model).get_parameter("a.onelora_vector"), before["a.onelora_vector"].double())


def test_disabled_blocks_of_two_threads_that_overlap():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(5, 8)
    expected, first, second = model(x), onelora.disabled(model), onelora.disabled(model)
    first.__enter__()
    second.__enter__()
    base = model(x)
    first.__exit__(None, None, None)
    assert torch.equal(model(x), base)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), expected)


def test_disabled_nests_and_restores_after_an_exception():
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    x = torch.randn(5, 8)
    with torch.no_grad():
        expected = model(x)
        with contextlib.suppress(KeyError), onelora.disabled(model):
            with onelora.disabled(model):
                inner = model(x)
            assert torch.equal(model(x), inner)
            raise KeyError
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("call", ["save", "load", "merge", "detach", "export"])
def test_what_would_take_the_base_for_the_adapter_is_refused_while_disabled(call, tmp_path):
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    path = tmp_path / "a.safetensors"
    onelora.save_adapter(model, path)
    calls = {
        "save": lambda: onelora.save_adapter(model, path),
        "load": lambda: onelora.load_adapter(model, path),
        "merge": lambda: onelora.merge(model),
        "detach": lambda: onelora.detach(model),
        "export": lambda: export_onnx(nn.Sequential(model), (torch.randn(5, 8),), tmp_path / "m.onnx"),
    }
    with onelora.disabled(model), pytest.raises(onelora.StateError, match="disabled"):
        calls[call]()
