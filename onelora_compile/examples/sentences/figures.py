"""The figures of the page as SVG text; colours come from the page, so that they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from onelora_compile.examples.sentences.methods import ONE_LORA
from onelora_compile.examples.sentences.results import DemoResult, Row
from onelora_compile.printable import bytes_text

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 24, 18, 46


class Point(NamedTuple):
    """A method: its name, how many numbers it trains, its share of right answers."""

    name: str
    numbers: int
    accuracy: float


def quality(rows: Sequence[Point | Row]) -> str:
    """Right answers over trained numbers, one point a method."""
    low = math.floor(min(row.accuracy for row in rows) * 20 - 0.4) / 20
    high = min(1.0, math.ceil(max(row.accuracy for row in rows) * 20 + 0.4) / 20)
    first, last = (math.log10(pick(row.numbers for row in rows)) for pick in (min, max))
    first, last = math.floor(first), math.ceil(last)

    def x(numbers: float) -> float:
        return _LEFT + (math.log10(numbers) - first) / max(1, last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - (share - low) / max(1e-9, high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in range(round(low * 20), round(high * 20) + 1):
        at = y(tick / 20)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(_LEFT - 8, at + 4, f"{tick * 5} %", "end"))
    for power in range(first, last + 1):
        parts.append(_text(x(10**power), _HEIGHT - _BOTTOM + 20, _count(10**power), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "trained numbers", "middle"))
    taken: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row.name != ONE_LORA):
        across, down = x(row.numbers), y(row.accuracy)
        own = row.name == ONE_LORA
        parts.append(
            f'<circle class="{"own" if own else "dot"}" cx="{across:.1f}" cy="{down:.1f}" r="{8 if own else 6}"/>'
        )
        label = down - 12
        while any(abs(label - other) < 15 and abs(across - place) < 130 for place, other in taken):
            label += 15 if label >= down else -15
            if label < _TOP:
                label = down + 22
        taken.append((across, label))
        anchor = "end" if across > _WIDTH - 120 else "start" if across < _LEFT + 60 else "middle"
        parts.append(_text(across, label, f"{row.name} {row.accuracy:.1%}", anchor, "own" if own else ""))
    return _svg("right answers on unseen data over trained numbers, by method", parts, _WIDTH, _HEIGHT)


def bars(result: DemoResult) -> list[str]:
    """What a training step keeps in memory, and how long it takes: one figure each."""
    rows = result.rows
    return [
        _panel("kept for backward", rows, [float(row.kept_bytes) for row in rows], lambda v: bytes_text(int(v))),
        _panel("training step", rows, [row.step_ms for row in rows], lambda v: f"{v:.0f} ms"),
    ]


def _panel(title: str, rows: Sequence[Row], values: Sequence[float], form: Callable[[float], str]) -> str:
    whole, start = 340, 92
    width = whole - start - 70
    most = max(values) or 1.0
    parts = [_text(start, 16, title, "start", "title")]
    for line, (row, value) in enumerate(zip(rows, values, strict=True)):
        down = 30 + 28 * line
        own = "own" if row.name == ONE_LORA else ""
        parts.append(_text(start - 8, down + 14, row.name.replace(" fine-tuning", ""), "end", own))
        size = f'width="{value / most * width:.1f}" height="19"'
        parts.append(f'<rect class="{own or "dot"}" x="{start}" y="{down}" {size}/>')
        parts.append(_text(start + value / most * width + 6, down + 14, form(value), "start", own))
    return _svg(f"{title}, by method", parts, whole, 34 + 28 * len(rows))


def _count(number: int) -> str:
    return f"{number // 10**6} M" if number >= 10**6 else f"{number // 1000} k" if number >= 1000 else str(number)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    own = f' class="{kind}"' if kind else ""
    return f'<text{own} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(label: str, parts: Sequence[str], width: int, height: int) -> str:
    """An <svg> element with a text for screen readers."""
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
