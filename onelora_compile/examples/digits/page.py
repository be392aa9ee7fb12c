"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path

from onelora_compile.examples.digits import report
from onelora_compile.examples.digits.data import HELD_OUT
from onelora_compile.examples.digits.methods import ONE_LORA
from onelora_compile.examples.digits.results import DemoResult
from onelora_compile.weights.atomic_write import replacing

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #5b6675; --line: #e5e9ef; --accent: #0f766e; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: var(--ink); font: 16px/1.6 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 30px; line-height: 1.25; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 12px; }
p { margin: 0 0 12px; max-width: 78ch; } p:last-child { margin-bottom: 0; }
.lead { color: var(--soft); font-size: 17px; margin-bottom: 28px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 24px 28px; 
  margin: 0 0 20px; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.own td { color: var(--accent); font-weight: 650; background: #f0faf8; }
tbody tr:last-child td { border-bottom: 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); 
  gap: 20px; margin: 0 0 20px; }
.numbers div { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 18px 22px; }
.numbers b { display: block; font-size: 27px; line-height: 1.2; color: var(--accent); }
.numbers span { color: var(--soft); font-size: 14px; }
.note { color: var(--soft); font-size: 14px; margin-top: 14px; }
ul { margin: 0; padding-left: 20px; } li { margin-bottom: 6px; max-width: 78ch; }
code { font-size: 0.92em; background: #f0f3f6; padding: 1px 5px; border-radius: 4px; }
"""


def write(result: DemoResult, figures: dict[str, str], path: Path) -> None:
    """Write the page; an existing file is replaced in one step."""
    body = [
        "<h1>One trained vector per linear: adapting to shifted digits</h1>",
        f'<p class="lead">{escape(_lead(result))}</p>',
        _numbers(result),
        _section("The domains", figures["samples"], _note("; ".join(f"{n}: {t}" for n, t in result.domains.items()))),
        _section("Comparison", _table(result), _note(_conditions(result))),
        _section("Accuracy and what it costs", figures["bars"]),
        _section("Training", figures["losses"], _note("Moving average over a twentieth of the steps.")),
        _section("What 1LoRA gives", _list(report.findings(result))),
        _section("Where it loses", _list(report.losses(result))),
        _section("Deployment", _list([report.deployed(result), report.engine(result), report.swapped(result)])),
        _section("How this was measured", _list(_method(result)), _note(_where(result))),
    ]
    with replacing(path) as beside:
        beside.write_text(_page("\n".join(body)), encoding="utf-8")


def _page(body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>1LoRA on shifted digits</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{''.join(parts)}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _list(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _lead(result: DemoResult) -> str:
    return (
        f"A vision transformer with {result.base_parameters:,} parameters, pretrained on handwritten digits, is "
        "adapted to shifted ones. 1LoRA trains one vector b per frozen linear: y = Wx + c + b·sum(x)."
    )


def _numbers(result: DemoResult) -> str:
    one, swap = result.row(ONE_LORA), result.swap
    shown = [
        (f"{result.rows[0].accuracy:.0%} → {one.accuracy:.0%}", "held-out accuracy on domain A, by 1LoRA"),
        (f"{one.parameters:,}", "trained numbers"),
        (f"{result.onnx.difference:.0e}", "largest difference, ONNX Runtime to PyTorch"),
        (f"{swap.milliseconds:.1f} ms", f"to swap an adapter; {swap.recompiled} recompilations"),
    ]
    return '<div class="numbers">' + "".join(f"<div><b>{b}</b><span>{t}</span></div>" for b, t in shown) + "</div>"


def _table(result: DemoResult) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in report.COLUMNS)
    lines = []
    for row in result.rows:
        own = ' class="own"' if row.name == ONE_LORA else ""
        lines.append(f"<tr{own}>" + "".join(f"<td>{escape(cell)}</td>" for cell in report.cells(row)) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _conditions(result: DemoResult) -> str:
    return (
        f"Held-out accuracy; a step is forward, backward and AdamW on {result.settings['batch']} images. 'No "
        "adaptation' is the frozen base with a gradient to its input, the floor of what backward through the model "
        "keeps and takes. The original domain is shown adapted; it can be switched off, other training can't."
    )


def _method(result: DemoResult) -> list[str]:
    settings = result.settings
    rates = ", ".join(f"{row.name} {row.learning_rate:g}" for row in result.rows if row.learning_rate)
    return [
        f"{settings['pretrain_steps']} steps of pretraining, {settings['steps']} of adaptation, batches of "
        f"{settings['batch']}, seed {settings['seed']}. Every method sees the same images in the same order.",
        f"Learning rates, chosen per method on a fifth of the training images, left out of training then: {rates}.",
        "Held-out images were used for the accuracies in this report only.",
        "Bytes saved for backward: storages that autograd holds after an eager forward, each once, without parameters.",
        "Step times: medians over rounds in which all methods take turns; compile time is not among them.",
        f"One seed: differences of a few points between methods are not significant with {HELD_OUT} images.",
    ]


def _where(result: DemoResult) -> str:
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    parts = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    return f"{parts}. Wall time: {stages}."
