"""Choose learning rates on validation data, test once, write the tables.

python -m benchmarks.eval --quick                          everything in minutes, in a folder that goes away
python -m benchmarks.eval --tasks films                    all methods on one task: an hour on one core
python -m benchmarks.eval                                  the whole, hours; what has a result is not run again
python -m benchmarks.eval --range-test                     what a finder of rates proposes, minutes
python -m benchmarks.eval --table                          tables and figures of the results that are there
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from onelora_compile.errors import OneLoRAError
from onelora_compile.examples.sentences.methods import HEAD_ONLY, ONE_LORA
from onelora_compile.examples.sentences.train import STEPS
from onelora_compile.progress import counting

from . import range_test, stages, store, tables
from .digits import Digits
from .methods import METHODS, why_not
from .pronunciations import Pronunciations
from .rates import RULES
from .sentences import Sentences
from .task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "pronunciations": Pronunciations,
    "films": lambda: Sentences("films", STEPS),  # as long as in the demo, whose rates are chosen here
    "products": lambda: Sentences("products", 30),
    "news": lambda: Sentences("news", 30),
    "digits": Digits,
}
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # for every method of every task
SEEDS = (1, 2, 3)


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return rate


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--rates", nargs="+", type=_rate, default=list(GRID), help="the grid, the same for every method"
    )
    parser.add_argument("--rule", default="", choices=list(RULES), help="a rate for each vector; with --methods 1LoRA")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), help="to test with; none: rates alone")
    parser.add_argument("--folder", type=Path, default=store.RESULTS, help="of the results")
    parser.add_argument("--fixed", type=_rate, help="this rate for every task, validation data and --seeds alone")
    parser.add_argument("--range-test", action="store_true", help="a range test of 1LoRA's rate, and nothing else")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps at one rate: shows that it works, not how well"
    )
    parser.add_argument(
        "--table", action="store_true", help="run nothing, write the tables and figures into the documentation"
    )
    chosen = parser.parse_args()
    if chosen.rule and chosen.methods != [ONE_LORA]:
        parser.error("--rule gives vectors their rates: it needs --methods 1LoRA")
    if chosen.quick and (chosen.fixed is not None or chosen.range_test or chosen.folder != store.RESULTS):
        parser.error("--quick has rates, seeds and a folder of its own")
    try:
        with _folder(chosen) as folder:
            if not chosen.table:
                _run(chosen, folder)
            _show(chosen, folder)
    except OneLoRAError as error:
        raise SystemExit(f"error: {error}") from error


@contextlib.contextmanager
def _folder(chosen: argparse.Namespace) -> Iterator[Path]:
    if not chosen.quick:
        yield chosen.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _run(chosen: argparse.Namespace, folder: Path) -> None:
    rates, seeds = chosen.rates, chosen.seeds
    with counting("evaluation") as bar:
        for name in chosen.tasks:
            task = TASKS[name]()
            if chosen.quick:
                task.steps, task.most, rates, seeds = 3, 24, [1e-3], SEEDS[:1]
            if chosen.range_test:
                range_test.measure(folder, task, bar)
                continue
            for method in chosen.methods:
                if reason := why_not(method, task):
                    print(f"{name}, {method}: not run, {reason}")
                    continue
                if chosen.fixed is not None:
                    stages.at_one_rate(folder, task, method, chosen.fixed, seeds, bar, chosen.rule)
                    continue
                tried = [task.head_rate] if method == HEAD_ONLY else rates
                stages.choose(folder, task, method, tried, bar, chosen.rule)
                if seeds:
                    stages.answer_test(folder, task, method, seeds, bar, chosen.rule)


def _show(chosen: argparse.Namespace, folder: Path) -> None:
    texts = [text for name in chosen.tasks if (text := tables.whole(folder, TASKS[name]()))]
    Console(width=120).print(Markdown("\n\n".join(texts) or "no results yet"))
    if chosen.table and folder == store.RESULTS:
        tables.write_pages(folder, [make() for make in TASKS.values()])


if __name__ == "__main__":
    main()
