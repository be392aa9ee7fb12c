"""A progress bar on a terminal, and silence anywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def steps(title: str, total: int, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that announces the next of `total` steps by its name."""
    console = Console(stderr=True)
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
