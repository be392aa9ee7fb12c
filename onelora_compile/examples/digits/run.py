"""Pretrain, adapt by every method, compare."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelora_compile.adapting.adapter import unwrap
from onelora_compile.examples.digits.data import Domain, load_domains
from onelora_compile.examples.digits.methods import BASE, Method, all_methods
from onelora_compile.examples.digits.train import BATCH, predict, pretrain, train
from onelora_compile.examples.measure import step_times, training_step
from onelora_compile.examples.progress import Announce, progress
from onelora_compile.examples.recipes import accuracy
from onelora_compile.printable import bytes_text
from onelora_compile.table import Table
from onelora_compile.testing import saved_bytes

COLUMNS = ("method", "shifted domain", "original domain", "trained numbers", "file", "kept for backward", "eager step")


def compare(seed: int = 0, pretrain_steps: int = 1000, steps: int = 300, rounds: int = 7) -> Table:
    """The methods in a table: accuracy on held-out digits, and costs.

    The global random state is as before afterwards.

    Args:
        seed: of the split, the pretraining, the adapters and the order of the batches.
        pretrain_steps: of the base.
        steps: of each method.
        rounds: how often every training step is timed.

    Raises:
        MissingExtraError: scikit-learn or PEFT is not installed.
    """
    methods = all_methods()
    with torch.random.fork_rng(devices=[]), progress(pretrain_steps + steps * len(methods)) as announce:
        original, shifted = load_domains(seed)
        announce("pretraining")
        base = pretrain(original, pretrain_steps, seed, announce.tick)
        models: dict[str, nn.Module] = {}
        sizes: dict[str, int] = {}
        for method in methods:
            announce(method.name)
            models[method.name], sizes[method.name] = _adapted(base, method, shifted, steps, seed, announce)
        announce("measuring")
        images, labels = shifted.train_images[:BATCH], shifted.train_labels[:BATCH]
        # The frozen base is the floor: what backward to its first layer costs, with nothing trained.
        frozen, traced = copy.deepcopy(base).requires_grad_(False), images.clone().requires_grad_()
        losses = {name: _loss(model, images, labels) for name, model in models.items()}
        losses = {BASE: _loss(frozen, traced, labels)} | losses
        models = {BASE: frozen} | models
        times = step_times({name: training_step(models[name], loss) for name, loss in losses.items()}, rounds)
        table = Table(*COLUMNS, title="a small vision transformer, adapted to shifted digits")
        for name, model in models.items():
            table.add_row(
                name,
                *(f"{accuracy(predict(model, one.test_images), one.test_labels):.1%}" for one in (shifted, original)),
                f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
                bytes_text(sizes[name]) if name in sizes else "–",
                bytes_text(saved_bytes(losses[name])),
                f"{times[name]:.1f} ms",
            )
    return table


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Any:
    return lambda: F.cross_entropy(model(images), labels)


def _adapted(
    base: nn.Module, method: Method, domain: Domain, steps: int, seed: int, announce: Announce
) -> tuple[nn.Module, int]:
    """The trained model, not compiled, and the bytes of what its users would store."""
    torch.manual_seed(seed)
    plain = method.prepare(copy.deepcopy(base))
    model: Any = torch.compile(plain, backend="onelora") if method.compiled else plain
    train(model, domain.train_images, domain.train_labels, method.learning_rate, steps, seed, announce.tick)
    with tempfile.TemporaryDirectory() as folder:
        return unwrap(model), method.save(model, Path(folder)).stat().st_size
