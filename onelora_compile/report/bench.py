"""What adapting costs on this machine: a training step against the frozen base's, in eager and compiled."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from onelora_compile.adapting.adapter import adapt, detach, unwrap
from onelora_compile.adapting.adapter_state import adapted_weights
from onelora_compile.errors import ConfigError
from onelora_compile.kinds import as_args
from onelora_compile.looking.untouched import Kept
from onelora_compile.printable import Printable, bytes_text
from onelora_compile.progress import steps
from onelora_compile.report.timing import interleaved, ratios
from onelora_compile.table import Table
from onelora_compile.testing import saved_bytes

BASE, OWN = "frozen base", "1LoRA"


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to make a step.

    Attributes:
        mode: "eager" or "compiled".
        method: "frozen base" or "1LoRA".
        milliseconds: of a step, the median over the rounds.
        ratio: of its time to the frozen base's in the same mode: median, 20 and 80 % quantiles over the rounds.
        kept: bytes kept for backward, without parameters.
    """

    mode: str
    method: str
    milliseconds: float
    ratio: tuple[float, float, float]
    kept: int


@dataclasses.dataclass(frozen=True)
class BenchReport(Printable):
    """What `bench` measured; `print` shows a table."""

    model: str
    vectors: int
    device: str
    rounds: int
    rows: list[Row]

    def __rich__(self) -> Table:
        table = Table(
            title=f"training step of {self.model}, {self.vectors} vectors, {self.device}, {self.rounds} rounds"
        )
        for column in ("mode", "method", "ms", "ratio to base", "20 %", "80 %", "kept for backward"):
            table.add_column(column, justify="left" if column in ("mode", "method") else "right")
        for row in self.rows:
            numbers = [f"{value:.3f}" for value in row.ratio]
            table.add_row(row.mode, row.method, f"{row.milliseconds:.1f}", *numbers, bytes_text(row.kept))
        return table


def bench(
    model: nn.Module,
    args: Sequence[Any] | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    rounds: int = 11,
    compiled: bool = True,
    progress: bool = True,
) -> BenchReport:
    """Measure forward, loss and backward to the inputs, of the frozen base and of the adapted model.

    Where no input is a floating-point tensor (token ids) the embeddings are trained in both, so that the base has a
    backward too.  Both are copies, in evaluation mode; the model is not changed.

    Args:
        model: adapted or not; one that is not is adapted with the default configuration.
        args: inputs.
        kwargs: keyword inputs.
        rounds: how often every way is timed; they take turns.
        compiled: also under Inductor, where compiling takes minutes for a large model.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        ConfigError: too few rounds, or a model without a gradient or a floating-point output.
    """
    if rounds < 2:
        raise ConfigError(f"rounds={rounds}: at least 2 are needed for quantiles")
    root = unwrap(model)
    with Kept(root, tensors=True):  # lists, counters and random states that the copies share with it
        return _measured(root, args, kwargs, rounds, compiled, progress)


def _measured(
    root: nn.Module,
    args: Sequence[Any] | Tensor,
    kwargs: Mapping[str, Any] | None,
    rounds: int,
    compiled: bool,
    progress: bool,
) -> BenchReport:
    own, base = copy.deepcopy(root).eval(), copy.deepcopy(root).eval()
    if adapted_weights(root):
        detach(base)
    else:
        adapt(own)
    models = {BASE: base.requires_grad_(False), OWN: own}
    given, named = _with_gradient((as_args(args), dict(kwargs or {})), models)
    rows: list[Row] = []
    modes = ("eager", "compiled")[: 1 + compiled]
    with steps("bench", len(modes), progress) as step, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in modes:
            step(mode)
            backends = {BASE: "inductor", OWN: "onelora"}
            if mode == "compiled":
                models = {name: torch.compile(one, backend=backends[name]) for name, one in models.items()}  # type: ignore[misc]
            runs = {name: _step(one, given, named) for name, one in models.items()}
            times = interleaved(runs, rounds)
            for name, ratio in ratios(times, BASE).items():
                milliseconds = 1e3 * sorted(times[name])[rounds // 2]
                rows.append(Row(mode, name, milliseconds, ratio, saved_bytes(_step(models[name], given, named, False))))
    device = next(root.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return BenchReport(type(root).__name__, len(adapted_weights(own)), where, rounds, rows)


def _with_gradient(inputs: Any, models: Mapping[str, nn.Module]) -> Any:
    def prepared(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if floating else value

    ready = pytree.tree_map(prepared, inputs)
    if not any(isinstance(value, Tensor) and value.requires_grad for value in pytree.tree_leaves(ready)):
        for model in models.values():
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.requires_grad_()
    return ready


def _step(model: nn.Module, args: Any, kwargs: Any, backward: bool = True) -> Callable[[], None]:
    leaves = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]

    def run() -> None:
        for tensor in (*leaves, *model.parameters()):
            tensor.grad = None
        outputs = [value for value in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(value, Tensor)]
        floating = [value for value in outputs if value.is_floating_point() and value.requires_grad]
        if not floating:
            raise ConfigError("no output has a gradient: give an input in floating point, or a model with embeddings")
        loss = floating[0].square().mean()
        if backward:
            loss.backward()

    return run
