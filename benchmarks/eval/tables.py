"""Tables in Markdown and figures in SVG of the results that there are, and the pages that show them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from onelora_compile.examples.sentences import figures
from onelora_compile.printable import bytes_text
from onelora_compile.weights.atomic_write import replacing

from . import range_test, rate_study, stages, store
from .methods import METHODS
from .task import Task

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / name for name in ("evaluation.md", "which-method.md", "tutorials/vision.md")]
STYLE = (
    "<style>text{font:12px sans-serif;fill:#444}.dot{fill:#5b7083}.own{fill:#c2410c}.grid{stroke:#ccc}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}.dot{fill:#9fb3c8}.own{fill:#fb923c}.grid{stroke:#555}}</style>"
)


def quality(folder: Path, task: Task) -> str:
    """What each method reached, "" where nothing was tested."""
    rows = []
    for method in sorted({store.label(run) for run in store.read(folder, task.name, "test")}, key=_place):
        runs = store.read(folder, task.name, "test", method)
        rows.append(_row(task, method, runs, store.read(folder, task.name, "validation", method)))
    head = ["", "trained numbers", "kept for backward", "peak", "step, CPU", "rate", "validation", "test", "range"]
    head += ["test loss"] if task.chosen_by == "loss" else []
    return markdown(head, rows) if rows else ""


def grid(folder: Path, task: Task) -> str:
    """What each rate gave on the validation data, the chosen one in bold; "" where nothing was tried."""
    runs = store.read(folder, task.name, "validation")
    rates = sorted({run["rate"] for run in runs})
    rows = []
    for method in sorted({store.label(run) for run in runs}, key=_place):
        own = {run["rate"]: run for run in runs if store.label(run) == method}
        chosen = stages.best(list(own.values()), task.chosen_by)["rate"]
        rows.append([method, *(_score(own.get(rate), task, bold=rate == chosen) for rate in rates)])
    return markdown(["", *(f"{rate:g}" for rate in rates)], rows) if rows else ""


def figure(folder: Path, task: Task) -> str:
    """Right answers over trained numbers as an SVG file, "" where nothing was tested."""
    tested = {method: store.read(folder, task.name, "test", method) for method in METHODS}
    points = [
        figures.Point(method, runs[0]["numbers"], statistics.fmean(run["test"]["accuracy"] for run in runs))
        for method, runs in tested.items()
        if runs
    ]
    if not points:
        return ""
    opening = '<svg xmlns="http://www.w3.org/2000/svg" '
    return figures.quality(points).replace("<svg ", opening, 1).replace('">', f'">{STYLE}', 1) + "\n"


def whole(folder: Path, task: Task) -> str:
    """All of a task as Markdown, "" where there is nothing."""
    parts = [part for part in (quality(folder, task), grid(folder, task)) if part]
    return "\n\n".join([f"### {task.name}", task.base, *parts]) if parts else ""


def summary(folder: Path, tasks: Sequence[Task]) -> str:
    """The mean share of right answers to the test of every method on every task."""
    tested: dict[tuple[str, str], list[float]] = {}
    for task in tasks:
        for run in store.read(folder, task.name, "test"):
            tested.setdefault((task.name, store.label(run)), []).append(run["test"]["accuracy"])
    names = [task.name for task in tasks if any(task.name == name for name, _ in tested)]
    rows = [
        [method, *(f"{statistics.fmean(one):.1%}" if (one := tested.get((name, method))) else "–" for name in names)]
        for method in sorted({one for _, one in tested}, key=_place)
    ]
    return markdown(["test: right answers", *names], rows)


def write_pages(folder: Path, tasks: Sequence[Task]) -> None:
    """Write the tables into the pages, between their marks, and the figures beside the first."""
    for page in PAGES:
        text = filled(page.read_text(encoding="utf-8"), folder, tasks)
        with replacing(page) as beside:
            beside.write_text(text, encoding="utf-8")
    for task in tasks:
        if drawing := figure(folder, task):
            with replacing(DOCS / f"evaluation-{task.name}.svg") as beside:
                beside.write_text(drawing, encoding="utf-8")


def filled(text: str, folder: Path, tasks: Sequence[Task]) -> str:
    """A page with the tables of the results between its marks, `<!-- results: NAME -->` and `<!-- end -->`."""
    made = {f"{kind} {task.name}": make(folder, task) for task in tasks for kind, make in KINDS.items()}
    made |= {
        "rates": rate_study.table(folder, tasks),
        "summary": summary(folder, tasks),
        "range": range_test.table(folder, tasks),
        "one rate": rate_study.against_own_rates(folder, tasks),
    }

    def fill(mark: re.Match[str]) -> str:
        return f"{mark[1]}\n{made[mark[2]]}\n{mark[3]}"

    return re.sub(r"(<!-- results: (.+?) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


KINDS = {"quality": quality, "grid": grid}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(task: Task, method: str, runs: list[dict[str, Any]], tried: list[dict[str, Any]]) -> list[str]:
    """The cells of a method; its rate has a mark where no lower or no higher one was tried."""
    rates = sorted(run["rate"] for run in tried)
    rate = runs[0]["rate"]
    end = "" if len(rates) == 1 else " (lowest)" if rate == rates[0] else " (highest)" if rate == rates[-1] else ""
    test = [run["test"]["accuracy"] for run in runs]
    cells = [
        method,
        f"{runs[0]['numbers']:,}",
        bytes_text(runs[0]["kept_bytes"]),
        _mean(runs, "peak_bytes", lambda value: bytes_text(int(value))),
        _mean(runs, "step_cpu_ms", lambda value: f"{value:.0f} ms"),
        f"{rate:g}{end}",
        f"{statistics.fmean(run['validation']['accuracy'] for run in runs):.1%}",
        f"{statistics.fmean(test):.1%}",
        f"{min(test):.1%} to {max(test):.1%}",
    ]
    return cells + (
        [f"{statistics.fmean(run['test']['loss'] for run in runs):.3f}"] if task.chosen_by == "loss" else []
    )


def _mean(runs: list[dict[str, Any]], key: str, form: Any) -> str:
    values = [run[key] for run in runs if key in run]
    return form(statistics.median(values)) if values else "–"


def _score(run: dict[str, Any] | None, task: Task, bold: bool) -> str:
    if run is None:
        return "–"
    scores = run["validation"]
    loss = "diverged" if scores["loss"] is None else f"{scores['loss']:.3f}"
    text = loss if task.chosen_by == "loss" else f"{scores['accuracy']:.1%}"
    return f"**{text}**" if bold else text


def _place(method: str) -> tuple[int, str]:
    names = list(METHODS)
    return names.index(method.partition(",")[0]), method
