"""The demo from the first image to the last number."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.adapting.adapter import unwrap
from onelora_compile.examples.digits import figures, page, report
from onelora_compile.examples.digits.data import Domain, load_domains
from onelora_compile.examples.digits.deploy import deploy_engine, deploy_onnx, swap
from onelora_compile.examples.digits.measure import Step, backward_bytes, machine, step_times, training_step
from onelora_compile.examples.digits.methods import BASE, ONE_LORA, Method, all_methods
from onelora_compile.examples.digits.progress import Announce, progress
from onelora_compile.examples.digits.results import DemoResult, Row
from onelora_compile.examples.digits.train import BATCH, accuracy, predict, pretrain, train


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How long each part runs."""

    pretrain: int
    adapt: int
    timing_rounds: int
    swap_rounds: int


FULL = Sizes(pretrain=1000, adapt=300, timing_rounds=7, swap_rounds=10)
QUICK = Sizes(pretrain=20, adapt=4, timing_rounds=1, swap_rounds=2)


@dataclasses.dataclass
class Adapted:
    """A method's outcome before the timing, which runs all methods in turns."""

    method: Method
    model: nn.Module
    losses: list[float]
    file_bytes: int


def run_demo(folder: Path, *, seed: int = 0, quick: bool = False) -> DemoResult:
    """Adapt a small vision transformer to shifted digits by several methods, deploy the 1LoRA adapter, report.

    Writes digits-A.safetensors, digits-B.safetensors, digits.onnx, digits.engine (where TensorRT-RTX is installed),
    results.json and report.html; the result prints as a table. The global random state is as before afterwards.

    Args:
        folder: where to write; made if it is not there.
        seed: of the split, the pretraining, the adapters and the order of the batches.
        quick: a few steps only: shows that everything works, not how well.

    Raises:
        MissingExtraError: an optional dependency is not installed; the message names the extra.
        OSError: the folder can't be written.
    """
    report.check_dependencies()
    sizes, clock = QUICK if quick else FULL, Clock()
    folder.mkdir(parents=True, exist_ok=True)
    methods = all_methods()
    total = sizes.pretrain + sizes.adapt * (len(methods) + 1)
    with torch.random.fork_rng(devices=[]), progress(total) as announce:
        domains = load_domains(seed)
        original, first, second = domains
        announce("pretraining")
        with clock("pretrain"):
            base = pretrain(original, sizes.pretrain, seed, announce.tick)
        adapted: list[Adapted] = []
        for method in methods:
            announce(method.name)
            with clock(method.name):
                adapted.append(_adapt(base, method, first, sizes.adapt, seed, announce))
        one = next(item.model for item in adapted if item.method.name == ONE_LORA)
        files = [folder / f"digits-{domain.name}.safetensors" for domain in (first, second)]
        onelora.save_adapter(one, files[0])
        announce("timing")
        with clock("measure"):
            rows = _rows(base, adapted, original, first, sizes.timing_rounds)
        announce("exporting to ONNX")
        with clock("export"):
            exported = deploy_onnx(one, base, folder / "digits.onnx", first)
        announce("building an engine")
        with clock("engine"):
            engine = deploy_engine(folder / "digits.onnx", base, folder / "digits.engine", first)
        built = [folder / "digits.engine", folder / "digits.engine.json"] if engine.built_by else []
        announce("a second adapter")
        with clock("second adapter"):
            _reset(one)
            rate = next(method.learning_rate for method in methods if method.name == ONE_LORA)
            train(one, second.train_images, second.train_labels, rate, sizes.adapt, seed, announce.tick)
            onelora.save_adapter(one, files[1])
        announce("swapping adapters")
        with clock("swap"):
            swapped = swap(one, base, files, [first, second], sizes.swap_rounds)
        announce("drawing the report")
        result = DemoResult(
            rows=rows,
            onnx=exported,
            engine=engine,
            swap=swapped,
            base_parameters=sum(parameter.numel() for parameter in base.parameters()),
            domains={domain.name: domain.text for domain in domains},
            base_accuracies={d.name: accuracy(predict(base, d.test_images), d.test_labels) for d in domains},
            settings={"seed": seed, "batch": BATCH, "pretrain_steps": sizes.pretrain, "steps": sizes.adapt},
            machine=machine(),
            seconds=clock.seconds | {"total": clock.total()},
            files=[*files, folder / "digits.onnx", *built, folder / "results.json", folder / "report.html"],
        )
        result.write(folder / "results.json")
        page.write(result, figures.draw(result, domains), folder / "report.html")
    return result


def _adapt(base: nn.Module, method: Method, domain: Domain, steps: int, seed: int, announce: Announce) -> Adapted:
    torch.manual_seed(seed)
    plain = method.prepare(copy.deepcopy(base))
    compiled: Any = torch.compile(plain, backend="onelora") if method.compiled else plain
    model: nn.Module = compiled
    rate = method.learning_rate
    losses = train(model, domain.train_images, domain.train_labels, rate, steps, seed, announce.tick)
    with tempfile.TemporaryDirectory() as folder:
        return Adapted(method, model, losses, method.save(model, Path(folder)).stat().st_size)


def _rows(base: nn.Module, adapted: list[Adapted], original: Domain, shifted: Domain, rounds: int) -> list[Row]:
    """Evaluate and measure everything, in eager, and 1LoRA compiled too."""
    batch = shifted.train_images[:BATCH], shifted.train_labels[:BATCH]
    # The frozen base is the floor: what backward to its first layer costs, with nothing trained.
    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen_batch = batch[0].clone().requires_grad_(), batch[1]
    steps: dict[str, Step] = {BASE: training_step(frozen, *frozen_batch)}
    steps |= {item.method.name: training_step(unwrap(item.model), *batch) for item in adapted}
    compiled = {item.method.name: training_step(item.model, *batch) for item in adapted if item.method.compiled}
    times = step_times(steps | {f"compiled {name}": step for name, step in compiled.items()}, rounds)

    def row(name: str, model: nn.Module, saved: int, item: Adapted | None) -> Row:
        return Row(
            name=name,
            accuracy=accuracy(predict(model, shifted.test_images), shifted.test_labels),
            original_accuracy=accuracy(predict(model, original.test_images), original.test_labels),
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad) if item else 0,
            file_bytes=item.file_bytes if item else None,
            saved_bytes=saved,
            step_ms=times[name],
            compiled_ms=times.get(f"compiled {name}"),
            learning_rate=item.method.learning_rate if item else None,
            losses=item.losses if item else [],
        )

    rows = [row(BASE, base, backward_bytes(frozen, *frozen_batch), None)]
    for item in adapted:
        model = unwrap(item.model)
        rows.append(row(item.method.name, model, backward_bytes(model, *batch), item))
    return rows


def _reset(model: nn.Module) -> None:
    """Back to zero vectors, for another adapter on the same compiled model."""
    with torch.no_grad():
        for vector in onelora.vectors(model).values():
            vector.zero_()
            vector.grad = None


class Clock:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure a block."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start
