"""A progress bar on a terminal, and silence anywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from onelora_compile.target import Target

_LONG = 500_000_000  # weights; fewer take less than a few seconds


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


def over_weights(title: str, targets: Mapping[str, Target]) -> Iterator[tuple[str, Target]]:
    """The items of `targets`, with a progress bar if going over their weights takes long."""
    entries = sum(p.numel() for t in targets.values() for p in t.module.parameters(recurse=False))
    with steps(title, len(targets), show=entries > _LONG) as announce:
        for name, target in targets.items():
            announce(name)
            yield name, target
