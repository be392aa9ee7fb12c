"""What counts as a linear: adapted alike on every path, or refused by name."""

import copy
import random
from typing import Any

import numpy as np
import paths
import pytest
import torch
from linears import IN, LINEARS, OUT, OUTPUT, Model, base, built, linear, long
from torch import nn

import onelora_compile as onelora
from onelora_compile.adapting.adapter_state import adapted_weights
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import assert_parity, fill_vectors, gradients, merged_copy
from onelora_compile.weight_uses import weight_reads


def by_output(model, base, x):
    """The function of a model that is adapted by its output, with nothing of the package."""
    v = onelora.vectors(model)
    h = base.first(x) + v["first"] * x.sum(-1, keepdim=True)
    return base.own(h) + v["own"] * h.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", LINEARS)
def test_every_kind_is_told_by_what_it_does(name):
    (_, what, dims), (model, x) = LINEARS[name], built(name)
    base = copy.deepcopy(model) if name not in ("weight_norm",) else built(name)[0]
    before = model(x)
    onelora.adapt(model)
    target = adapted_weights(model)["own"]
    assert (target.called, target.dims) == (what != "read", dims)
    assert torch.equal(model(x), before)
    fill_vectors(model, 0.3)
    expected = by_output(model, base, x) if what == "output" else merged_copy(model)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert onelora.summary(model).output_only == (["own"] if what == "output" else [])
    onelora.detach(model)
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo, of autograd functions
@pytest.mark.parametrize("name", long(LINEARS))
def test_every_kind_compiled(name):
    model, x = built(name)
    fill_vectors(onelora.adapt(model), 0.3)
    fast = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_further_parameters_of_a_linear_are_named():
    model = onelora.adapt(built("own_lora")[0])
    assert onelora.summary(model).skipped == {"own.a": weight_reads.INSIDE}


@pytest.mark.parametrize("name", [name for name in LINEARS if name not in OUTPUT])
def test_one_that_is_w_x_merges(name):
    model, x = built(name)
    fill_vectors(onelora.adapt(model), 0.3)
    expected = model(x)
    onelora.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OUTPUT)
def test_merge_refuses_the_others_by_name(name, tmp_path):
    model, x = built(name)
    fill_vectors(onelora.adapt(model), 0.3)
    expected = model(x)
    with pytest.raises(onelora.MergeError, match="'own'"):
        onelora.merge(model)
    assert torch.equal(model(x), expected)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    twin, _ = built(name)
    assert torch.equal(onelora.load_adapter(twin, tmp_path / "a.safetensors")(x), expected)


TRAINING = [name for name in LINEARS if "training" in name or name == "scaled_with_gradients"]


@pytest.mark.parametrize("name", TRAINING)
def test_one_that_trains_otherwise_is_one_function_in_training_too(name):
    """In evaluation each is W x + c, so that only training tells an update of its output from one of its weight."""
    torch._dynamo.reset()
    fresh, x = built(name)
    model = onelora.adapt(copy.deepcopy(fresh)).train()
    line, fast = (
        torch.compile(one, backend="onelora", options={"inner": "aot_eager"}) for one in (fresh.train(), model)
    )
    with pytest.warns(onelora.OneLoRAWarning, match="adapted 2 linears"):
        first = line(x).sin().sum()
    of_zeros = gradients(first, onelora.vectors(fresh)), gradients(model(x).sin().sum(), onelora.vectors(model))
    torch.testing.assert_close(*of_zeros)
    fill_vectors(model, 0.3)
    fill_vectors(fresh, 0.3)
    merged = merged_copy(model)
    assert (built(name)[0].train()(x) - merged(x)).abs().max() > 0.1
    exact = merged_copy(model, torch.float64)(x.double())
    for run in (copy.deepcopy(model), fast, line):
        assert_parity(run(x), exact, merged(x))
    onelora.merge(model)
    assert_parity(model(x), exact, merged(x))


class Later(nn.Linear):
    """W x + c, until somebody sets something."""

    scale, flag, table = 1.0, False, {"scale": 1.0}

    def __init__(self):
        super().__init__(IN, OUT)
        self.register_buffer("gain", torch.ones(OUT))
        self.child = nn.Identity()

    def forward(self, x):
        y = self.child(super().forward(x))
        return y if self.flag is False and self.scale == self.table["scale"] == 1 else y * self.scale * 2


LATER = {
    "attribute": lambda own: setattr(own, "scale", 3.0),
    "flag": lambda own: setattr(own, "flag", True),
    "table": lambda own: setattr(own, "table", {"scale": 3.0}),
    "child": lambda own: setattr(own, "child", nn.ReLU()),
}


@pytest.mark.parametrize("change", LATER)
def test_merge_refuses_a_linear_that_became_another_function(change):
    """The vector adds to its output, as when it was adapted; in the weight it would be scaled too."""
    model, x = Model(Later()).eval(), torch.randn(8, 5)
    fill_vectors(onelora.adapt(model), 0.3)
    LATER[change](model.own)
    expected = model(x)
    with pytest.raises(onelora.MergeError, match="'own': Later computes something else"):
        onelora.merge(model)
    assert torch.equal(model(x), expected)


CALLS: list[Any] = []


class Leaky(nn.Linear):
    """A forward that leaves traces wherever code can."""

    calls = 0
    seen: dict[str, Any] = {}
    steps: torch.Tensor

    def __init__(self):
        super().__init__(IN, OUT)
        self.config = {"sizes": [1]}
        self.register_buffer("steps", torch.zeros(()))
        self.norm = nn.BatchNorm1d(OUT)

    def forward(self, x):
        Leaky.calls += 1
        Leaky.seen["last"] = x.shape
        CALLS.append(x.shape)
        self.config["sizes"].append(2)
        self.steps += 1
        self.last = x
        noise = torch.rand(()) + random.random() + np.random.rand()
        return self.norm(super().forward(x)) + 0 * noise


@pytest.mark.parametrize("training", [True, False])
def test_a_probe_leaves_no_trace(training, capsys):
    model = Model(Leaky()).train(training)
    model.own.register_forward_hook(lambda *args: CALLS.append("hook"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    randoms = torch.random.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].copy()
    onelora.adapt(model)
    onelora.detach(model)
    assert torch.equal(torch.random.get_rng_state(), randoms[0])
    assert random.getstate() == randoms[1]
    assert (np.random.get_state(legacy=False)["state"]["key"] == randoms[2]).all()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (Leaky.calls, Leaky.seen, CALLS) == (0, {}, [])
    assert model.own.config == {"sizes": [1]}
    assert not hasattr(model.own, "last")
    assert all(module.training is training for module in model.modules())
    assert capsys.readouterr().out == ""


def test_hooks_see_and_change_an_adapted_linear_as_they_do_its_base():
    """A hook is around the forward, so W + b 1ᵀ in the weight and the update of the output are one function."""
    model, x = Model(nn.Linear(IN, OUT)), torch.randn(8, 5)
    model.own.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.own.register_forward_hook(lambda module, args, y: y.relu())
    fill_vectors(onelora.adapt(model), 0.3)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="onelora", options={"inner": "aot_eager"})(x), expected)
    onelora.merge(model)
    torch.testing.assert_close(model(x), expected)


def test_a_forward_of_the_instance_is_refused_by_name():
    model = Model(nn.Linear(IN, OUT))
    model.own.forward = lambda x: nn.functional.linear(x, model.own.weight) * 2
    with pytest.raises(onelora.TargetError, match="'own' has a forward of its own on the instance"):
        onelora.adapt(model)


def test_one_that_needs_more_than_its_input_is_adapted_by_its_output():
    made = linear(lambda self, x, gate: nn.functional.linear(x, self.weight) * gate)()
    x, gate = torch.randn(3, IN), torch.randn(3, 1)
    base = made(x, gate)
    model = fill_vectors(onelora.adapt(nn.ModuleList([made])), 0.3)
    torch.testing.assert_close(made(x, gate), base + x.sum(-1, keepdim=True) * onelora.vectors(model)["0"])
    with pytest.raises(onelora.MergeError, match="'0'"):
        onelora.merge(model)


def test_weights_on_the_meta_device_are_told_too():
    with torch.device("meta"):
        model = Model(linear(lambda self, x: nn.functional.linear(x, self.weight) * 2)())
        plain = Model(linear(lambda self, x: nn.functional.linear(x, self.weight))())
    assert adapted_weights(onelora.adapt(model))["own"].dims is None
    assert adapted_weights(onelora.adapt(plain))["own"].dims == (1,)
    assert all(parameter.is_meta for parameter in model.parameters())


class Empty(nn.Module):
    """Linears without outputs and without inputs, beside one that has both."""

    def __init__(self, kind):
        super().__init__()
        self.full, self.none, self.nothing = kind(IN, OUT), kind(IN, 0), kind(0, OUT)

    def forward(self, x):
        return self.full(x) + self.nothing(self.none(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@pytest.mark.parametrize("own", [False, True])
def test_of_width_zero_on_every_path(own, tmp_path):
    kind = type("Own", (nn.Linear,), {"forward": lambda self, x: base(self, x)}) if own else nn.Linear
    model, x = Empty(kind), torch.randn(5, IN)
    paths.check_model(model, {"x": x}, grad=True)
    assert {name: len(vector) for name, vector in onelora.vectors(model).items()} == {
        "full": OUT,
        "none": 0,
        "nothing": OUT,
    }
    expected = model(x)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(onelora.load_adapter(copy.deepcopy(model), tmp_path / "a.safetensors")(x), expected)
    for mode in ("fold", "input", "load"):
        export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode)
    onelora.merge(model)
    torch.testing.assert_close(model(x), expected)


def test_under_autocast_and_in_half_precision():
    model = Model(linear(lambda self, x: nn.functional.linear(x, self.weight, self.bias))()).to(torch.bfloat16)
    with torch.autocast("cpu"):
        assert adapted_weights(onelora.adapt(model))["own"].dims == (1,)
