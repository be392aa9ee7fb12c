"""The figures of the page, as SVG text."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from onelora_compile.errors import require
from onelora_compile.examples.digits.data import Domain
from onelora_compile.examples.digits.methods import ONE_LORA
from onelora_compile.examples.digits.results import DemoResult

ACCENT, GREY, INK = "#0f766e", "#b8c0cc", "#1f2937"
LINES = ("#94a3b8", "#d97706", "#7c3aed", "#db2777", ACCENT, "#22a699", "#2563eb")
DASHED = ("MiSS r=1",)  # lies on the line of 1LoRA
SHOWN = 12  # sample images per domain


def draw(result: DemoResult, domains: list[Domain]) -> dict[str, str]:
    """All figures by name."""
    matplotlib = require("matplotlib", "demo", "draw the report")
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#cbd5e1",
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.hashsalt": "onelora",
    }
    with matplotlib.rc_context(style):
        return {
            "samples": _samples(domains),
            "losses": _losses(result),
            "bars": _bars(result),
        }


def _samples(domains: list[Domain]) -> str:
    figure = _figure(10, 2.9)
    axes = figure.subplots(len(domains), SHOWN)
    for line, domain in zip(axes, domains, strict=True):
        for axis, image in zip(line, domain.test_images[:SHOWN].numpy(), strict=True):
            axis.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(domain.name, rotation=0, ha="right", va="center", labelpad=8)
    return _svg(figure, "the same held-out images in the three domains")


def _losses(result: DemoResult) -> str:
    figure = _figure(10, 3.6)
    axis = figure.subplots()
    trained = [row for row in result.rows if row.losses]
    for row, colour in zip(trained, LINES, strict=True):
        window = max(1, len(row.losses) // 20)
        smooth = np.convolve(row.losses, np.ones(window) / window, mode="valid")
        width = 2.6 if row.name == ONE_LORA else 1.5
        dash = (0, (2, 2)) if row.name in DASHED else "solid"
        order = 3 if row.name in DASHED else 2
        steps = np.arange(len(smooth)) + window
        axis.plot(steps, smooth, color=colour, lw=width, ls=dash, label=row.name, zorder=order)
    axis.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    axis.grid(axis="y", color="#eef2f6")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, "training loss of each method")


def _bars(result: DemoResult) -> str:
    figure = _figure(10, 6.4)
    rows = result.rows[::-1]
    panels: list[tuple[str, list[float], bool, str]] = [
        ("held-out accuracy, domain A (%)", [100 * row.accuracy for row in rows], False, "{:.1f}"),
        ("trained numbers (log scale)", [row.parameters for row in rows], True, "{:,.0f}"),
        ("adapter file, bytes (log scale)", [row.file_bytes or 0 for row in rows], True, "{:,.0f}"),
        ("saved for backward, MB", [row.saved_bytes / 1e6 for row in rows], False, "{:.2f}"),
    ]
    for axis, (title, values, log, form) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        colours = [ACCENT if row.name == ONE_LORA else GREY for row in rows]
        shown = [max(value, 1) for value in values] if log else values
        drawn = axis.barh([row.name for row in rows], shown, color=colours, height=0.68)
        axis.bar_label(drawn, [form.format(value) if value else "none" for value in values], padding=3, fontsize=9)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        if log:
            axis.set_xscale("log")
        axis.set_xlim(1 if log else 0, max(shown) * (12 if log else 1.18))
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(length=0)
        axis.set_xticks([], minor=False)
        axis.set_xticks([], minor=True)
    return _svg(figure, "accuracy, trained numbers, file size and bytes saved for backward of each method")


def _figure(width: float, height: float) -> Any:
    # Not pyplot: that would choose a backend for the whole process.
    figure = require("matplotlib.figure", "demo", "draw the report")
    return figure.Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any, label: str) -> str:
    """The figure as an <svg> element with a text for screen readers."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
