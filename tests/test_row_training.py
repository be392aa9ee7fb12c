"""Several adapters trained in one batch: the same numbers as if each were trained alone, on its own rows."""

import copy

import pytest
import torch
import zoo

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

USERS = "abcd"


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mixed_batch_trains_each_as_if_alone(compiled, optimizer, tmp_path):
    torch.manual_seed(0)
    base = zoo.MLP().double()
    model = onelora.adapt(copy.deepcopy(base))
    for user in USERS:
        onelora.add_adapter(model, user)
    run = (
        torch.compile(model, backend="onelora", options={"inner": "aot_eager"}, dynamic=True, fullgraph=True)
        if compiled
        else model
    )
    together = optimizer(onelora.row_parameters(model).values(), lr=1e-2)
    alone = {user: onelora.adapt(copy.deepcopy(base)) for user in USERS}
    optimizers = {user: optimizer(onelora.trainable_parameters(one), lr=1e-2) for user, one in alone.items()}
    for step in range(12):
        # At first two of them have no rows; "d" never has any before the last steps.
        users = [USERS[i] for i in torch.randint(0, 2 if step < 4 else 3 if step < 10 else 4, (5,)).tolist()]
        x, target = torch.randn(5, 8).double(), torch.randn(5, 7).double()
        together.zero_grad()
        with onelora.rows(model, users):
            (run(x) - target).pow(2).sum().backward()
        together.step()
        for user in set(users):
            rows = [row for row, one in enumerate(users) if one == user]
            optimizers[user].zero_grad()
            (alone[user](x[rows]) - target[rows]).pow(2).sum().backward()
            optimizers[user].step()
        if step == 5:
            onelora.add_adapter(model, "late")  # the table grows
    for user in USERS:
        onelora.save_adapter(model, tmp_path / "one.safetensors", adapter_name=user)
        onelora.save_adapter(alone[user], tmp_path / "other.safetensors")
        one, other = (onelora.read_adapter(tmp_path / f"{name}.safetensors") for name in ("one", "other"))
        for key in other.vectors:
            torch.testing.assert_close(one.vectors[key], other.vectors[key], rtol=1e-6, atol=1e-9)
    assert not any(vector.any() for vector in onelora.vectors(model).values())


def test_gradients_add_up_until_zero_grad():
    model = onelora.adapt(zoo.MLP().double())
    onelora.add_adapter(model, "one")
    (parameter,) = onelora.row_parameters(model).values()
    x = torch.randn(2, 8).double()
    with onelora.rows(model, ["one", None]):
        model(x).sum().backward()
    assert parameter.grad is not None
    once = parameter.grad.clone()
    out = []
    for _ in range(2):
        with onelora.rows(model, ["one", None]):
            out.append(model(x).sum())
    (out[0] + out[1]).backward()  # outside, and of two forwards
    torch.testing.assert_close(parameter.grad, 3 * once)
    assert all(vector.grad is None or not vector.grad.any() for vector in onelora.vectors(model).values())


def test_the_active_adapter_learns_by_the_models_own_vectors():
    model = fill_vectors(onelora.adapt(zoo.MLP().double(), adapter_name="one"), 0.5)
    onelora.add_adapter(model, "two")
    onelora.row_parameters(model)
    x, vectors = torch.randn(3, 8).double(), list(onelora.vectors(model).values())
    expected = torch.autograd.grad(model(x[:2]).sin().sum(), vectors)
    with onelora.rows(model, ["one", "one", "two"]):
        actual = torch.autograd.grad(model(x).sin().sum(), vectors)
    torch.testing.assert_close(actual, expected)


def test_what_is_trained_moves_with_a_switch():
    model = onelora.adapt(zoo.MLP().double(), adapter_name="one")
    onelora.add_adapter(model, "two")
    parameters = onelora.row_parameters(model)
    assert list(parameters) == ["two"]
    with torch.no_grad():
        parameters["two"].fill_(0.5)
    onelora.set_adapter(model, "two")
    assert all((vector == 0.5).all() for vector in onelora.vectors(model).values())
    assert list(onelora.row_parameters(model)) == ["one"]
