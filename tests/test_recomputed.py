"""A checkpointed forward runs again in the backward, where the model may have other values: right, or an error."""

import copy

import pytest
import torch
import zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])
KINDS = pytest.mark.parametrize("kind", [zoo.MLP, "read"])
CLOSED = "block of that forward is closed: call backward inside the block"
OPEN = "that forward was outside of the onelora.disabled block that is open now: call backward outside"
SWITCHED = "values of another adapter since that forward .*: call backward before the switch"


class Read(nn.Module):
    """A linear whose weight is read."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.a.weight, self.a.bias).tanh(), self.b.weight)


class Case:
    """A checkpointed model with two adapters, and its gradients by the weights that it stands for."""

    def __init__(self, kind, reentrant, tmp_path):
        torch.manual_seed(0)
        self.base = (Read if kind == "read" else kind)().double()
        self.model = fill_vectors(onelora.adapt(copy.deepcopy(self.base)), 0.5, seed=1)
        assert onelora.vectors(self.model)
        self.file = tmp_path / "a.safetensors"
        onelora.save_adapter(self.model, self.file)
        onelora.add_adapter(self.model, "other")
        onelora.set_adapter(self.model, "other")
        fill_vectors(self.model, 0.5, seed=2)
        onelora.set_adapter(self.model, "default")
        self.x, self.reentrant = torch.randn(5, 8).double().requires_grad_(), reentrant

    def forward(self):
        return checkpoint(self.model, self.x, use_reentrant=self.reentrant)

    def gradients(self, out):
        """Of x, and of the vectors; zeros where there is none."""
        own = onelora.vectors(self.model).values()
        for one in (self.x, *own):
            one.grad = None
        out.sin().sum().backward()
        return [self.x.grad, *(torch.zeros_like(one) if one.grad is None else one.grad for one in own)]

    def expected(self, of_base=False):
        """Those of the base's own code with W + b 1ᵀ for each weight."""
        model, x = copy.deepcopy(self.base), self.x.detach().clone().requires_grad_()
        own = onelora.vectors(self.model).items()
        vectors = {name: vector.detach().clone().requires_grad_() for name, vector in own}
        weights = {
            name if name.endswith("weight") else f"{name}.weight": 0 * vector if of_base else vector
            for name, vector in vectors.items()
        }
        weights = {name: model.get_parameter(name).detach() + vector[:, None] for name, vector in weights.items()}
        torch.func.functional_call(model, weights, x).sin().sum().backward()
        return [x.grad, *(vector.grad for vector in vectors.values())]

    def assert_right(self, found, of_base=False):
        torch.testing.assert_close(found, self.expected(of_base))


@pytest.fixture
def case(kind, reentrant, tmp_path):
    return Case(kind, reentrant, tmp_path)


@KINDS
@REENTRANT
def test_the_block_of_the_forward_is_closed(case):
    with onelora.disabled(case.model):
        out = case.forward()
    with pytest.raises(onelora.StateError, match=CLOSED):
        case.gradients(out)
    with onelora.disabled(case.model):
        case.assert_right(case.gradients(case.forward()), of_base=True)


@KINDS
@REENTRANT
def test_a_block_is_open_that_the_forward_was_not_in(case):
    out = case.forward()
    with onelora.disabled(case.model), pytest.raises(onelora.StateError, match=OPEN):
        case.gradients(out)
    case.assert_right(case.gradients(case.forward()))


@KINDS
@REENTRANT
@pytest.mark.parametrize("how", ["set", "scale", "load", "load_named", "back"])
def test_the_adapter_is_another_one(case, how):
    out = case.forward()
    if how == "load":
        onelora.load_adapter(onelora.detach(case.model), case.file)
    elif how == "load_named":
        onelora.load_adapter(case.model, case.file, adapter_name="default")
    elif how == "scale":
        onelora.set_adapter(case.model, "default", scale=0.5)
    else:
        onelora.set_adapter(case.model, "other")
        if how == "back":  # as PyTorch without a checkpoint: the tensors were written to
            onelora.set_adapter(case.model, "default")
    with pytest.raises(onelora.StateError, match=SWITCHED):
        case.gradients(out)
    case.assert_right(case.gradients(case.forward()))


@KINDS
@REENTRANT
def test_training_goes_on_after_blocks_and_switches(case):
    for name in ("other", "default", "other"):
        case.assert_right(case.gradients(case.forward()))
        with onelora.disabled(case.model), torch.no_grad():
            case.model(case.x)
        case.assert_right(case.gradients(case.forward()))
        with onelora.disabled(case.model):
            case.assert_right(case.gradients(case.forward()), of_base=True)
        onelora.set_adapter(case.model, name)
    case.assert_right(case.gradients(case.forward()))


@KINDS
@REENTRANT
@pytest.mark.parametrize("gradients", [False, True])
def test_a_block_between_a_forward_and_its_backward(case, gradients):
    """The reference of preference optimisation."""
    for _ in range(2):
        out = case.forward()
        with onelora.disabled(case.model), torch.set_grad_enabled(gradients):
            case.model(case.x)
        case.assert_right(case.gradients(out))


@KINDS
@REENTRANT
def test_a_block_inside_what_is_checkpointed(case):
    def forward(x):
        with onelora.disabled(case.model), torch.no_grad():
            reference = case.model(x)
        return case.model(x) - reference

    out = checkpoint(forward, case.x, use_reentrant=case.reentrant)
    found = case.gradients(out)
    reference = case.base(case.x.detach()).detach()
    torch.testing.assert_close(found, case.gradients(case.model(case.x) - reference))


@pytest.mark.parametrize("reentrant", [False])
@pytest.mark.parametrize("kind", [zoo.MLP])
@pytest.mark.parametrize("how", ["closed", "open", "switched"])
def test_compiled_around_a_checkpoint_nothing_runs_again_outside_of_the_graph(case, how):
    run = torch.compile(case.forward, backend="onelora", options={"inner": "aot_eager"})
    run()
    if how == "closed":
        with onelora.disabled(case.model):
            out = run()
        case.assert_right(case.gradients(out), of_base=True)
    elif how == "open":
        out = run()
        with onelora.disabled(case.model):
            case.assert_right(case.gradients(out))
    else:
        out = run()
        onelora.set_adapter(case.model, "other")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            case.gradients(out)
