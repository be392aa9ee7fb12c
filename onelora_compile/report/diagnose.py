"""Which layers 1LoRA can move, told before any training.

A step of 1LoRA moves the weight of a linear along b 1ᵀ alone.  Two things decide what that is worth for a layer:

    share     ‖G 1‖² / (n ‖G‖²)   how much of the gradient G [out, in] of the weight lies there; n inputs
    constant  mean(s)² / mean(s²)  of the sums s of the inputs: at 1 every input has the same sum, and b is a bias

A direction at random has a share of 1/n, so the share is told as a multiple of that.  Both are of the first step: they
tell which layers cannot learn, not which learn best.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Group
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.select_targets import is_norm, select
from onelora_compile.adapting.weight_target import Target
from onelora_compile.errors import ConfigError, StateError
from onelora_compile.kinds import as_args
from onelora_compile.looking.untouched import Kept
from onelora_compile.printable import Printable, shortened
from onelora_compile.table import Table

CONSTANT = 0.99  # from here on the sums of a layer count as one number
WEAK = 0.5  # times a random direction: below, a layer learns little
_BAR = 20


@dataclasses.dataclass(frozen=True)
class LayerSum:
    """One linear.

    Attributes:
        name: of its vector.
        in_features: that are summed.
        share: of the gradient of its weight that lies along the ones, 0 to 1; None without a gradient, or where the
            weight is no plain tensor.
        constant: how much the sums of its inputs are one number, 0 to 1; None where the weight is not used by a call of
            its module.
    """

    name: str
    in_features: int
    share: float | None
    constant: float | None

    @property
    def times_random(self) -> float | None:
        """The share over that of a direction at random."""
        return None if self.share is None else self.share * self.in_features


@dataclasses.dataclass(frozen=True)
class LayerReport(Printable):
    """The linears of a model.

    Attributes:
        layers: in the order of the model.
        loss: what the gradient is of.
        norms: whether the model has norms that could be trained.
    """

    layers: list[LayerSum]
    loss: str
    norms: bool

    @property
    def advice(self) -> list[str]:
        """What to do, in sentences."""
        known = [one for one in self.layers if one.times_random is not None]
        flat = [one.name for one in self.layers if one.constant is not None and one.constant >= CONSTANT]
        weak = [one.name for one in known if (one.times_random or 0.0) < WEAK]
        silent = [one.name for one in self.layers if one.share is None]
        said = []
        if flat:
            said.append(
                f"{len(flat)} of {len(self.layers)} get inputs whose sum is nearly one number, so their vectors are "
                f"biases ({shortened(flat, 4)})."
            )
        if weak:
            said.append(f"{len(weak)} have less of their gradient along the ones than along a direction at random.")
        if self.norms and (len(flat) + len(weak)) * 3 > len(self.layers):
            said.append("Train the norms too, train_norms=True: that gives the sums something to tell.")
        if silent:
            said.append(f"{len(silent)} get no gradient here, or hold no plain weight ({shortened(silent, 4)}).")
        if known:
            middle = statistics.median(one.times_random or 0.0 for one in known)
            best = sorted(known, key=lambda one: -(one.times_random or 0.0))[:3]
            names = ", ".join(f"{one.name} ({one.times_random:.1f})" for one in best)
            said.append(f"The middle layer has {middle:.1f} times a random direction; the most have {names}.")
        return said

    def __rich__(self) -> Group:
        table = Table(title=f"what 1LoRA can move, by the gradient of {self.loss}")
        for column in ("layer", "inputs", "times random", "", "sums constant"):
            table.add_column(
                column, justify="right" if column in ("inputs", "times random", "sums constant") else "left"
            )
        most = max((one.times_random or 0.0 for one in self.layers), default=0.0) or 1.0
        for one in self.layers:
            times = one.times_random
            table.add_row(
                one.name,
                str(one.in_features),
                "–" if times is None else f"{times:.2f}",
                "#" * round(_BAR * (times or 0.0) / most),
                "–" if one.constant is None else f"{one.constant:.1%}",
            )
        return Group(table, "\n".join(self.advice))


def diagnose(
    model: nn.Module,
    args: Sequence[Any] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    config: OneLoRAConfig | None = None,
) -> LayerReport:
    """Look at the gradient of each linear's weight on an example, before training; the model is not changed.

    Args:
        model: in evaluation mode meanwhile; its parameters need no gradients.
        args: of one call, best a batch of real data; a tensor alone is the one argument.
        kwargs: of that call.
        loss: from the output to a number; None is the output's own `loss` (transformers, with labels), or else its
            product with random numbers, which stands for a loss that is not known yet.
        config: which linears; None is all of them.

    Raises:
        ConfigError: the output holds no floating tensor, no weight has a gradient, the loss is no finite number, an
            input is on the meta device, or `config` is no `OneLoRAConfig`.
        StateError: a weight is on the meta device, or accelerate has offloaded it.
        TargetError: the config selects nothing.
    """
    selection = select(model, OneLoRAConfig() if config is None else config)
    weights = {name: weight for name, target in selection.targets.items() if (weight := target.weight) is not None}
    args, kwargs = as_args(args), dict(kwargs or {})
    _refuse_meta(weights, (args, kwargs))
    sums = _Sums(selection.targets)
    with _differentiable(model, list(weights.values())), sums.watched():
        output = model(*args, **kwargs)
        number, what = _loss(output, loss)
        if not number.requires_grad:
            raise ConfigError("no weight of the model's linears has a gradient: the output does not depend on them")
        if not math.isfinite(number.item()):
            raise ConfigError(f"{what} is {number.item()}: give inputs whose loss is a finite number")
        gradients = torch.autograd.grad(number, list(weights.values()), allow_unused=True)
    shares = {
        name: _share(gradient, selection.targets[name]) if gradient is not None else None
        for name, gradient in zip(weights, gradients, strict=True)
    }
    layers = [
        LayerSum(name, target.in_features, shares.get(name), sums.constant(name))
        for name, target in selection.targets.items()
    ]
    return LayerReport(layers, what, any(is_norm(module) for module in model.modules()))


def _refuse_meta(weights: Mapping[str, Tensor], inputs: Any) -> None:
    """What has no numbers to look at."""
    if (name := next((name for name, weight in weights.items() if weight.is_meta), None)) is not None:
        raise StateError(
            f"can't diagnose: the weight of {name!r} is not in memory (on the meta device, or offloaded by "
            "accelerate): load the model into memory first, as the gradient of each weight is what is looked at"
        )
    if any(isinstance(one, Tensor) and one.is_meta for one in pytree.tree_leaves(inputs)):
        raise ConfigError("can't diagnose: an input is on the meta device and holds no numbers: give a batch of data")


def _loss(output: Any, loss: Callable[[Any], Tensor] | None) -> tuple[Tensor, str]:
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"the loss gave {found}, and has to give a tensor with one number")
        return value, "the loss"
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own, "the model's loss"
    values = [one for one in pytree.tree_leaves(output) if isinstance(one, Tensor) and one.is_floating_point()]
    if not values:
        raise ConfigError(f"the output, {type(output).__name__}, holds no floating tensor: give a loss")
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(one.shape, generator=generator, device="cpu").to(one.device) for one in values]
    total = sum((one.float() * direction).sum() for one, direction in zip(values, directions, strict=True))
    assert isinstance(total, Tensor)
    return total, "its output in a random direction"


def _share(gradient: Tensor, target: Target) -> float | None:
    """How much of the gradient lies along the ones, over the input axes of the weight."""
    wide = gradient.double()
    whole = wide.square().sum().item()
    if not whole or not math.isfinite(whole):
        return None
    return float(wide.sum(target.dims or ()).square().sum().item() / target.in_features / whole)


@contextlib.contextmanager
def _differentiable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Evaluation mode, with gradients for the weights alone; afterwards all that the model can reach is as it was."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with Kept(model, tensors=True), torch.inference_mode(False), torch.enable_grad():
            model.eval().requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            yield
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)


class _Sums:
    """The feature sums of modules that are called, while they are watched."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._targets = targets
        self._seen: dict[str, list[float]] = {}  # count, sum, sum of squares

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """See what the modules are called with."""
        handles: list[Any] = []
        for name, target in self._targets.items():
            if target.called:
                handles.append(
                    target.module.register_forward_pre_hook(lambda _, given, name=name: self._see(name, given))
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].numel():
            sums = given[0].detach().double().sum(-1)
            seen = self._seen.setdefault(name, [0.0, 0.0, 0.0])
            for place, value in enumerate((float(sums.numel()), sums.sum().item(), sums.square().sum().item())):
                seen[place] += value

    def constant(self, name: str) -> float | None:
        """How much the sums are one number."""
        count, total, squares = self._seen.get(name, (0.0, 0.0, 0.0))
        return total * total / count / squares if squares else None
