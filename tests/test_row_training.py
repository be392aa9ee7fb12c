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


def gradients(model, parameters, loss):
    """Of one backward: those of the waiting adapters; None for what has none."""
    for parameter in parameters.values():
        parameter.grad = None
    loss(model).backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def two_users():
    torch.manual_seed(0)
    model = onelora.adapt(zoo.MLP().double())
    for user in "ab":
        onelora.add_adapter(model, user)
    return model, onelora.row_parameters(model), torch.randn(3, 8).double()


def of_rows(ids, x):
    def loss(model):
        with onelora.rows(model, ids):
            return model(x).sin().sum()

    return loss


@pytest.mark.parametrize("when", ["before the backward", "between two forwards", "before the step"])
@pytest.mark.parametrize("wider", [False, True])
def test_an_adapter_that_comes_meanwhile_takes_no_gradient_away(when, wider):
    torch.manual_seed(0)
    config = onelora.OneLoRAConfig(target_modules=["a"] if wider else "all-linear")
    model, x = onelora.adapt(zoo.MLP().double(), config), torch.randn(3, 8).double()
    for user in "ab":
        onelora.add_adapter(model, user)
    parameters, first_linear = onelora.row_parameters(model), len(onelora.vectors(model)["a"])
    twice = when == "between two forwards"
    expected = gradients(model, parameters, lambda model: of_rows(["a", "b", None], x)(model) * (2 if twice else 1))
    for parameter in parameters.values():
        parameter.grad = None
    first = of_rows(["a", "b", None], x)(model)
    if when == "before the step":
        first.backward()
    for number in range(6):
        onelora.add_adapter(model, str(number), onelora.OneLoRAConfig())
    if when != "before the step":
        (first + of_rows(["a", "b", None], x)(model) if twice else first).backward()
    for user, parameter in parameters.items():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        torch.testing.assert_close(parameter.grad[:first_linear], expected[user][:first_linear])


def test_after_a_backward_that_failed():
    model, parameters, x = two_users()
    loss = of_rows(["a", "b", None], x)
    expected = gradients(model, parameters, loss)

    def fail(gradient):
        raise RuntimeError("out of memory")

    names = list(onelora.vectors(model))
    handle = model.get_submodule(names[0]).register_forward_hook(lambda module, args, y: y.register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss(model).backward()
    handle.remove()
    actual = gradients(model, parameters, loss)
    for user in "ab":
        torch.testing.assert_close(actual[user], expected[user])


def test_the_row_of_a_deleted_adapter_is_out_of_an_optimizers_reach():
    model, parameters, x = two_users()
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    of_rows(["a", "b", None], x)(model).backward()
    onelora.delete_adapter(model, "a")
    onelora.add_adapter(model, "zoe")
    optimizer.step()
    onelora.set_adapter(model, "zoe")
    assert not any(vector.any() for vector in onelora.vectors(model).values())


def test_an_adapter_trains_on_its_own_linears_alone():
    torch.manual_seed(0)
    base, x = zoo.MLP().double(), torch.randn(3, 8).double()
    config = onelora.OneLoRAConfig(target_modules=["a"])
    model, alone = onelora.adapt(copy.deepcopy(base)), onelora.adapt(copy.deepcopy(base), config)
    for name in ("active", "row"):
        onelora.add_adapter(model, name, config)
    row = torch.optim.AdamW([onelora.row_parameters(model)["row"]], lr=1e-2)
    of_rows(["row"] * 3, x)(model).backward()
    row.step()
    onelora.set_adapter(model, "active")
    for one in (model, alone):
        one.zero_grad()
        optimizer = torch.optim.AdamW(onelora.trainable_parameters(one), lr=1e-2)
        one(x).sin().sum().backward()
        optimizer.step()
    expected = onelora.vectors(alone)["a"]
    for name in ("active", "row"):
        onelora.set_adapter(model, name)
        actual = dict(onelora.vectors(model))
        torch.testing.assert_close(actual.pop("a").float(), expected.float())
        assert not any(vector.any() for vector in actual.values())


def test_adapters_that_came_in_inference_mode_are_trained_as_any():
    model = onelora.adapt(zoo.MLP())
    x = torch.randn(2, 8)
    with torch.inference_mode():
        onelora.add_adapter(model, "a")
        with onelora.rows(model, ["a", None]):
            model(x)
        onelora.set_adapter(model, "a")
        onelora.set_adapter(model, "default")
    parameters = onelora.row_parameters(model)
    assert gradients(model, parameters, of_rows(["a", None], x))["a"] is not None
    torch.optim.SGD(parameters.values(), lr=0.1).step()
