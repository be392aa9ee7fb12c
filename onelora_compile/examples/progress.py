"""The demo's progress bar: training steps on a terminal, one line per stage anywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Announce:
    """Tells what goes on: calling it names the next stage, `tick` counts a training step."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def __call__(self, stage: str) -> None:
        """Name the stage that begins."""
        self._bar.update(self._task, description=stage, refresh=True)
        if not self._bar.console.is_terminal:
            self._bar.console.print(f"{stage} …")

    def tick(self) -> None:
        """Count a training step."""
        self._bar.advance(self._task)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Announce]:
    """A bar on standard error over `total` training steps; it goes away when it is done."""
    console = Console(stderr=True, emoji=False)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Announce(bar, bar.add_task("", total=total))
