"""A learning rate for each vector: against sizes of sums and outputs in float64, over the ways a weight is used."""

import copy

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ConfigError, OneLoRAWarning, StateError
from onelora_compile.testing import fill_vectors


def rms(values):
    return values.double().square().mean().sqrt().item()


def linear_factor(x, weight, bias=0.0):
    """The size of W x + c over that of the sum of x, in float64."""
    x, weight = x.double(), weight.double()
    return min(1.0, rms(x @ weight.T + bias) / rms(x.sum(-1)))


class Reads(nn.Module):
    """One weight that is read, as [out, in] and as [in, out] on other inputs."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.w), torch.nn.functional.linear(x.cos(), self.w)


def rates(model, batch, lr=1.0):
    return {group["name"]: group["lr"] for group in onelora.parameter_groups(model, lr, batch)}


def test_rates_of_called_linears_are_those_of_the_formula():
    torch.manual_seed(0)
    first, second, x = nn.Linear(8, 16), nn.Linear(16, 3), torch.randn(5, 8) + 1
    model = onelora.adapt(nn.Sequential(first, nn.ReLU(), second))
    base, inner = copy.deepcopy(model).double(), torch.relu(first(x))
    found = rates(model, x, lr=0.5)
    assert found["0"] == pytest.approx(0.5 * linear_factor(x, base[0].weight, base[0].bias), rel=1e-5)
    assert found["2"] == pytest.approx(0.5 * linear_factor(inner, base[2].weight, base[2].bias), rel=1e-5)
    assert list(found) == ["0", "2"]


def test_rates_of_a_weight_that_is_read_count_all_its_uses():
    torch.manual_seed(0)
    model, x = Reads(), torch.randn(5, 8) + 1
    weight = model.w.detach().clone()
    onelora.adapt(model)
    both = torch.cat([x, x.cos()]).double()
    expected = min(1.0, rms(both @ weight.double().T) / rms(both.sum(-1)))
    assert rates(model, x) == {"w": pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize("training", [False, True])
def test_rates_of_packed_attention(training):
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).train(training), torch.randn(3, 4, 8) + 1
    weight, bias = model.in_proj_weight.detach().clone(), model.in_proj_bias.detach().clone()
    onelora.adapt(model)
    found = rates(model, (x, x, x))
    assert found["in_proj_weight"] == pytest.approx(linear_factor(x, weight, bias), rel=1e-4)
    assert 0 < found["out_proj"] <= 1


def test_rates_of_a_convolution():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 5, 5) + 1
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 4)
    expected = linear_factor(pixels, conv.weight.flatten(1), conv.bias)
    model = onelora.adapt(nn.Sequential(conv), onelora.OneLoRAConfig(target_modules=["0"]))
    assert rates(model, x) == {"0": pytest.approx(expected, rel=1e-5)}


def test_rates_of_experts_that_a_tensor_picks():
    torch.manual_seed(0)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6, 8))

        def forward(self, x, picked):
            return torch.bmm(self.w[picked], x[..., None])

    model, x = Experts(), torch.randn(5, 8) + 1
    expected = linear_factor(x, model.w[1].detach())  # each row by the expert of number 1
    onelora.adapt(model)
    assert rates(model, (x, torch.full((5,), 1))) == {"w": pytest.approx(expected, rel=1e-5)}


def test_rates_under_checkpointing_and_in_half_precision():
    torch.manual_seed(0)
    inner, x = nn.Linear(8, 8), torch.randn(5, 8) + 1

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    expected = linear_factor(x, inner.weight, inner.bias)
    model = onelora.adapt(Checkpointed())
    assert rates(model, x) == {"inner": pytest.approx(expected, rel=1e-5)}
    half = rates(model.bfloat16(), x.bfloat16())
    assert half == {"inner": pytest.approx(expected, rel=2e-2)}


def test_no_vector_gets_more_than_lr_where_its_sums_are_nearly_zero():
    torch.manual_seed(0)
    model = onelora.adapt(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))  # a new norm: its outputs sum to zero
    assert rates(model, torch.randn(4, 8), lr=0.1) == {"1": 0.1}


def test_heads_and_norms_are_the_last_group():
    torch.manual_seed(0)
    config = onelora.OneLoRAConfig(modules_to_save=["head"], train_norms=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.norm(self.body(x)))

    adapted = onelora.adapt(Model(), config)
    groups = onelora.parameter_groups(adapted, 1e-2, torch.randn(4, 8) + 1)
    assert [group["name"] for group in groups] == ["body", "others"]
    assert groups[-1]["lr"] == 1e-2
    everything = {id(one) for group in groups for one in group["params"]}
    assert everything == {id(one) for one in onelora.trainable_parameters(adapted)}


def test_a_vector_that_the_batch_does_not_use_is_named_and_gets_the_median():
    torch.manual_seed(0)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, second=False):
            return self.b(x) if second else self.a(x)

    model = onelora.adapt(Branches())
    with pytest.warns(OneLoRAWarning, match="^b: the batch does not use these vectors.*median"):
        found = rates(model, torch.randn(4, 8) + 1)
    assert found["a"] == found["b"]


def test_layers_that_share_a_graph_have_rates_of_their_own():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            x = self.fc(x).relu() + 1
            torch._dynamo.graph_break()
            return x

    blocks, x = [Block() for _ in range(4)], torch.randn(5, 8) + 1
    expected, inner = {}, x
    for index, block in enumerate(blocks):
        expected[f"{index}.fc"] = pytest.approx(linear_factor(inner, block.fc.weight, block.fc.bias), rel=1e-5)
        inner = block(inner)
    model = onelora.adapt(nn.Sequential(*blocks))
    assert rates(model, x) == expected


def test_layers_of_one_compiled_region_have_rates_of_their_own():
    torch.manual_seed(0)

    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = region(layer, x)
            return x

    @torch.compiler.nested_compile_region
    def region(layer, x):
        return layer(x).relu() + 1

    model, x = Regions(), torch.randn(5, 8) + 1
    expected, inner = {}, x
    for index, layer in enumerate(model.layers):
        expected[f"layers.{index}"] = pytest.approx(linear_factor(inner, layer.weight, layer.bias), rel=1e-5)
        inner = layer(inner).relu() + 1
    onelora.adapt(model)
    assert rates(model, x) == expected


def test_a_layer_whose_output_is_zero_is_named_and_gets_the_median():
    torch.manual_seed(0)
    last = nn.Linear(8, 1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    model = onelora.adapt(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), last))
    with pytest.warns(OneLoRAWarning, match="^2: .*outputs that are zero"):
        found = rates(model, torch.randn(4, 8) + 1)
    assert found["2"] == found["0"] > 0


def test_a_layer_under_vmap_can_not_be_measured():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(torch.func.vmap(self.inner)(x))

    model = onelora.adapt(Mapped())
    with pytest.warns(OneLoRAWarning, match="^inner: the batch does not use these vectors, or in a way that can't"):
        found = rates(model, torch.randn(3, 2, 4) + 1)
    assert found["inner"] == found["last"]


def test_vectors_that_share_a_storage_have_rates_of_their_own():
    torch.manual_seed(0)
    model, x = onelora.adapt(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))), torch.randn(4, 8) + 1
    before, vectors = rates(model, x), list(onelora.vectors(model).values())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(vectors), vectors)
    assert rates(model, x) == before


def test_looking_changes_nothing():
    torch.manual_seed(0)
    model = fill_vectors(
        onelora.adapt(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))), 0.1
    )
    model.train()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 8)
    state = torch.get_rng_state()
    first = rates(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert rates(torch.compile(model, backend="onelora"), x) == first
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert model.training
    assert all(one.grad is None for one in model.parameters())


def test_an_optimizer_and_its_schedule_take_the_groups():
    torch.manual_seed(0)
    model, x = onelora.adapt(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))), torch.randn(64, 8) + 1
    fast, target = torch.compile(model, backend="onelora", options={"inner": "aot_eager"}), torch.randn(64, 1)
    optimizer = torch.optim.AdamW(onelora.parameter_groups(model, 1e-1, x), weight_decay=0)
    most = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, most, total_steps=30)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (fast(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("lr", [0, -1.0, float("nan"), float("inf"), True, "1e-2", 10**400])
def test_a_rate_that_is_none_is_refused(lr):
    model = onelora.adapt(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ConfigError, match=r"lr=.* is no positive number"):
        onelora.parameter_groups(model, lr, torch.randn(2, 4))


def test_a_model_without_vectors_is_refused():
    with pytest.raises(StateError):
        onelora.parameter_groups(nn.Linear(4, 4), 1e-2, torch.randn(2, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_whose_sums_have_no_size_is_refused(value):
    model = onelora.adapt(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ConfigError, match="the batch gives 0 NaN, infinity"):
        onelora.parameter_groups(model, 1e-2, torch.full((2, 4), value))
    with pytest.raises(ConfigError, match="uses none of the vectors"):
        onelora.parameter_groups(model, 1e-2, torch.empty(0, 4))


def test_a_model_without_numbers_is_refused():
    with pytest.raises(StateError, match="'0' is on the meta device"):
        onelora.parameter_groups(onelora.adapt(nn.Sequential(nn.Linear(4, 4, device="meta"))), 1e-2, torch.randn(2, 4))


def test_a_batch_by_names():
    torch.manual_seed(0)
    model, x = onelora.adapt(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4) + 1
    assert rates(model, {"input": x}) == rates(model, (x,)) == rates(model, [x]) == rates(model, x)
