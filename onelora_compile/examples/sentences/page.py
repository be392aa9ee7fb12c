"""The report as one HTML file that needs nothing else, for light and dark, phone and desktop."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from onelora_compile.examples.sentences import figures, report
from onelora_compile.examples.sentences.methods import ONE_LORA
from onelora_compile.examples.sentences.results import DemoResult
from onelora_compile.printable import bytes_text
from onelora_compile.weights.atomic_write import replacing

STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #fff; --ink: #1b2430; --soft: #566173; --line: #dfe5ec;
  --dot: #9aa7b8; --own: #0b7a6f; --tint: #eaf6f4; }
@media (prefers-color-scheme: dark) { :root { --page: #0f141b; --card: #171e27; --ink: #e6ebf2; --soft: #9dabbd;
  --line: #2b3542; --dot: #6b7a8f; --own: #3fc4b4; --tint: #14302f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.6 system-ui, "Segoe UI", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: clamp(26px, 5vw, 34px); line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.015em; }
h2 { font-size: 19px; margin: 0 0 12px; }
p { margin: 0 0 12px; max-width: 72ch; }
.lead { font-size: 18px; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 22px;
  margin: 0 0 18px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; margin: 22px 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.numbers b { display: block; font-size: 25px; line-height: 1.25; color: var(--own); }
.numbers span { color: var(--soft); font-size: 14px; }
svg { width: 100%; height: auto; display: block; font: 12.5px system-ui, "Segoe UI", sans-serif; }
.scroll { overflow-x: auto; } .scroll svg { min-width: 460px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 18px; }
h3 { font-size: 15px; margin: 18px 0 4px; }
svg text { fill: var(--soft); } svg text.own { fill: var(--own); font-weight: 650; }
svg text.title { fill: var(--ink); font-weight: 650; }
svg .grid { stroke: var(--line); } svg .dot { fill: var(--dot); } svg circle.own, svg rect.own { fill: var(--own); }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, .texts td, .texts th { text-align: left; }
td:first-child { white-space: nowrap; } .texts td:first-child { white-space: normal; }
tr.wrong td { color: var(--soft); }
tr.own td { color: var(--own); font-weight: 650; background: var(--tint); }
tbody tr:last-child td { border-bottom: 0; }
.note { color: var(--soft); font-size: 14px; margin: 12px 0 0; }
ul { margin: 0; padding-left: 20px; } li { margin-bottom: 6px; max-width: 72ch; }
"""


def write(result: DemoResult, path: Path) -> None:
    """Write the page; an existing file is replaced in one step."""
    first, *story = report.story(result)
    body = [
        f"<h1>{escape(report.headline(result))}</h1>",
        f'<p class="lead">{escape(first)}</p>',
        _numbers(result),
        "".join(f"<p>{escape(sentence)}</p>" for sentence in story),
        _section(
            "How well, and for how many numbers",
            f'<div class="scroll">{figures.quality(result.rows)}</div>',
            _note(f"{_question(result)} Right answers on {result.settings['test_sentences']} unseen sentences."),
        ),
        _section(
            "What training costs",
            f'<div class="pair">{"".join(figures.bars(result))}</div>',
            _note(report.saving(result)),
        ),
        _section("Where 1LoRA loses", _list(report.behind(result))),
        _section(
            "Every adapter on every task", _matrix(result), _note("Right answers. Each adapter has its own head.")
        ),
        _section("Sentences that no training saw", _examples(result)),
        _section("All numbers", _table(result), _note(report.engine(result))),
        _section("How this was measured", _list(_method(result)), _note(_where(result))),
    ]
    with replacing(path) as beside:
        beside.write_text(_page(report.headline(result), "\n".join(body)), encoding="utf-8")


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>1LoRA: {escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{''.join(parts)}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _question(result: DemoResult) -> str:
    return next(iter(result.tasks.values())).question


def _numbers(result: DemoResult) -> str:
    one, size = result.row(ONE_LORA), max(task.bytes for task in result.tasks.values())
    shown = [
        (f"{one.accuracy:.0%}", f"right on unseen film sentences, with {one.numbers:,} trained numbers"),
        (bytes_text(size), f"one adapter; the model has {bytes_text(result.fold.bytes)}"),
        (f"{result.swap.milliseconds:.1f} ms", f"to swap it; {result.swap.recompiled} recompilations"),
        (f"{result.bank.rows}", "sentences of three tasks in one batch of one session"),
    ]
    return '<div class="numbers">' + "".join(f"<div><b>{b}</b><span>{t}</span></div>" for b, t in shown) + "</div>"


def _rows(head: Iterable[str], lines: Iterable[tuple[str, Iterable[str]]], kind: str = "") -> str:
    shown = "".join(
        (f'<tr class="{mark}">' if mark else "<tr>") + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for mark, cells in lines
    )
    heads = "".join(f"<th>{escape(column)}</th>" for column in head)
    own = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{own}><thead><tr>{heads}</tr></thead><tbody>{shown}</tbody></table></div>'


def _table(result: DemoResult) -> str:
    return _rows(report.COLUMNS, (("own" if row.name == ONE_LORA else "", report.cells(row)) for row in result.rows))


def _matrix(result: DemoResult) -> str:
    lines = (
        ("", [name, *(f"{share:.1%}" for share in task.accuracies.values())]) for name, task in result.tasks.items()
    )
    return _rows(["adapter", *result.tasks], lines)


def _examples(result: DemoResult) -> str:
    parts = []
    for task in result.tasks.values():
        lines = (
            ("" if answer == right else "wrong", [text, answer if answer == right else f"{answer} (wrong)"])
            for text, answer, right in task.examples
        )
        parts.append(f"<h3>{escape(task.question)}</h3>" + _rows(["sentence", "answer"], lines, "texts"))
    return "".join(parts)


def _method(result: DemoResult) -> list[str]:
    settings = result.settings
    rates = ", ".join(f"{row.name} {row.learning_rate:g}" for row in result.rows)
    return [
        f"{settings['steps']} steps of {settings['batch']} sentences out of {settings['train_sentences']}, seed "
        f"{settings['seed']}; every method sees the same sentences in the same order and trains the same head.",
        f"Learning rates, chosen per method on other sentences: {rates}.",
        "Test sentences were used for the shares in this report only. With so few of them and one seed, differences of "
        "two or three points between methods mean nothing.",
        "Kept for backward: storages that autograd holds after an eager forward, each once, without parameters.",
        "Training step: median over rounds in which all methods take turns, in eager mode.",
        "Sentences: C.J. Hutto and E. Gilbert, VADER, ICWSM 2014 (MIT licence). Model: all-MiniLM-L6-v2 (Apache-2.0).",
    ]


def _where(result: DemoResult) -> str:
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    parts = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    return f"{parts}. Wall time: {stages}."
