"""A progress bar on a terminal, and silence anywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from onelora_compile.adapting.weight_target import Target

T = TypeVar("T")
_LONG = 500_000_000  # weights; fewer take less than a few seconds


@contextlib.contextmanager
def steps(title: str, total: int, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that announces the next of `total` steps by its name."""
    console = Console(stderr=True, emoji=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[step]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(title, total=total, step="")
        started = 0

        def announce(step: str) -> None:
            nonlocal started
            progress.update(task, completed=started, step=step, refresh=True)
            started += 1

        yield announce


class Count:
    """A bar that goes through named stages."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None, stage="")

    def start(self, stage: str, total: int) -> None:
        """Begin a stage of a number of steps."""
        self._progress.reset(self._task, total=total, stage=stage)

    def step(self) -> None:
        """One step of the stage is done."""
        self._progress.advance(self._task)

    def over(self, stage: str, items: Collection[T]) -> Iterator[T]:
        """Go over a collection as one stage."""
        self.start(stage, len(items))
        for item in items:
            yield item
            self.step()


@contextlib.contextmanager
def counting(title: str, show: bool = True) -> Iterator[Count]:
    """A bar for long work whose stages and steps are known as it goes."""
    console = Console(stderr=True, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[stage]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        yield Count(progress, title)


def over_weights(title: str, targets: Mapping[str, Target]) -> Iterator[tuple[str, Target]]:
    """The items of `targets`, with a progress bar if going over their weights takes long."""
    entries = sum(p.numel() for t in targets.values() for p in t.module.parameters(recurse=False))
    with steps(title, len(targets), show=entries > _LONG) as announce:
        for name, target in targets.items():
            announce(name)
            yield name, target
