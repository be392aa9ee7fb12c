"""The demo in words and as a table, for the terminal and for the page."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from onelora_compile.examples.sentences.methods import BITFIT, FULL, HEAD_ONLY, LORA, ONE_LORA
from onelora_compile.examples.sentences.results import DemoResult, Row
from onelora_compile.printable import bytes_text

COLUMNS = ("method", "right answers", "trained numbers", "file", "kept for backward", "training step")


def cells(row: Row) -> list[str]:
    """One line of the table, by `COLUMNS`."""
    return [
        row.name,
        f"{row.accuracy:.1%}",
        f"{row.numbers:,}",
        bytes_text(row.file_bytes),
        bytes_text(row.kept_bytes),
        f"{row.step_ms:.0f} ms",
    ]


def table(result: DemoResult) -> Table:
    """The comparison for the terminal."""
    title = f"MiniLM, frozen but for what is trained: {next(iter(result.tasks.values())).question}"
    shown = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    for column in COLUMNS:
        narrow = column.replace(" ", "\n", 1)
        shown.add_column(narrow, justify="left" if column == "method" else "right", no_wrap=True)
    for row in result.rows:
        shown.add_row(*cells(row), style="bold" if row.name == ONE_LORA else None)
    return shown


def text(result: DemoResult) -> str:
    """What else was found, and the files."""
    files = "\n".join(f"  {file}" for file in result.files)
    where = result.machine
    place = f"{where['cores']} CPU cores ({where['threads']} threads), torch {where['torch']}"
    paragraphs = [*story(result), *behind(result), engine(result)]
    return "\n".join([*paragraphs, f"{result.seconds['total']:.0f} s on {place}. Written:", files])


def headline(result: DemoResult) -> str:
    """What a newcomer should take home."""
    size = max(task.bytes for task in result.tasks.values())
    return f"One frozen model, three tasks, {bytes_text(size)} each"


def story(result: DemoResult) -> list[str]:
    """The demo in five sentences."""
    one, head, full = result.row(ONE_LORA), result.row(HEAD_ONLY), result.row(FULL)
    own = ", ".join(f"{name} {task.accuracies[name]:.1%}" for name, task in result.tasks.items())
    most = ", ".join(f"{task.majority:.1%}" for task in result.tasks.values())
    swap, bank, fold = result.swap, result.bank, result.fold
    size = max(task.bytes for task in result.tasks.values())
    rows = f"{bank.rows} rows" if not bank.other_answers else f"{bank.rows - bank.other_answers} of {bank.rows} rows"
    return [
        f"MiniLM has {result.base_numbers:,} pretrained parameters, which stay as they are; 1LoRA adds one trained "
        f"vector to each query and value projection, {one.numbers:,} numbers with the head, "
        f"{one.numbers / full.numbers:.2%} of all.",
        f"Of {result.settings['test_sentences']} film sentences that it has not seen it judges {one.accuracy:.1%} "
        f"right, the head alone {head.accuracy:.1%}, full fine-tuning {full.accuracy:.1%}.",
        f"The same frozen model learned three tasks, one file of {bytes_text(size)} each: {own} (always the more "
        f"frequent answer: {most}).",
        f"In PyTorch the files swap in one compiled model in {swap.milliseconds:.1f} ms each with {swap.recompiled} "
        "recompilations; in ONNX Runtime one session answers a batch in which each row has the adapter of its own "
        f"task, {rows} as the single adapters do.",
        f"An update over the air is {bytes_text(size)} instead of {bytes_text(fold.bytes)}, {fold.bytes / size:,.0f} "
        f"times less; or the vectors go into the weights, and the file has {fold.nodes} nodes as the base has "
        f"{fold.base_nodes} and judges {fold.accuracy:.1%} right.",
    ]


def behind(result: DemoResult) -> list[str]:
    """Where 1LoRA loses, in sentences; from the same numbers."""
    one = result.row(ONE_LORA)
    rest = [row for row in result.rows if row.name != ONE_LORA]
    sentences = [
        _behind(
            "is right less often than", [f"{r.name} ({r.accuracy:.1%})" for r in rest if r.accuracy > one.accuracy]
        ),
        _behind("trains more than", [f"{r.name} ({r.numbers:,})" for r in rest if r.numbers < one.numbers]),
        _behind(
            "keeps more for backward than",
            [f"{r.name} ({bytes_text(r.kept_bytes)})" for r in rest if r.kept_bytes < one.kept_bytes],
        ),
        _behind(
            "takes longer per step than", [f"{r.name} ({r.step_ms:.0f} ms)" for r in rest if r.step_ms < one.step_ms]
        ),
    ]
    why = (
        "One direction for each layer is little freedom: with more data LoRA of a higher rank and full fine-tuning "
        "have more to give, and a learning rate that suits 1LoRA depends on how many layers it adapts."
    )
    return [sentence for sentence in sentences if sentence] + [why]


def engine(result: DemoResult) -> str:
    """The engine, in a sentence."""
    one = result.engine
    if one.why_not:
        return f"TensorRT: no engine was built: {one.why_not}."
    return (
        f"TensorRT: an engine of the folded file for {', '.join(one.targets)}, built by {one.built_by} without a GPU "
        f"in {one.seconds:.1f} s, {bytes_text(one.bytes)}. It was not run here."
    )


def saving(result: DemoResult) -> str:
    """1LoRA beside LoRA r=1 and BitFit, in a sentence."""
    one, lora, bitfit = result.row(ONE_LORA), result.row(LORA), result.row(BITFIT)
    return (
        f"1LoRA trains {one.numbers:,} numbers and keeps {bytes_text(one.kept_bytes)} for backward, LoRA r=1 "
        f"{lora.numbers:,} and {bytes_text(lora.kept_bytes)}, BitFit {bitfit.numbers:,} and "
        f"{bytes_text(bitfit.kept_bytes)}."
    )


def _behind(how: str, others: list[str]) -> str:
    return f"It {how} {', '.join(others)}." if others else ""
