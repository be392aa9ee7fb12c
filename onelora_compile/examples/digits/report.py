"""The demo in words and as a table, for the terminal and for the page."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from onelora_compile.errors import require
from onelora_compile.examples.digits.import_peft import import_peft
from onelora_compile.examples.digits.methods import BASE, ONE_LORA
from onelora_compile.examples.digits.results import DemoResult, Row
from onelora_compile.printable import bytes_text

COLUMNS = (
    "method",
    "shifted domain A",
    "original domain",
    "trained numbers",
    "file",
    "saved for backward",
    "step, eager",
    "step, compiled",
)
# The same for a terminal of 80 columns.
NARROW = (
    "method",
    "accuracy\non A",
    "on the\noriginal",
    "trained\nnumbers",
    "file",
    "kept for\nbackward",
    "step,\neager",
    "step,\ncompiled",
)


def check_dependencies() -> None:
    """Fail before the first training step where something that is needed at the end is missing.

    Raises:
        MissingExtraError: the message names the extra.
    """
    for module, purpose in (
        ("sklearn", "load the digits"),
        ("matplotlib", "draw the report"),
        ("onnxscript", "export to ONNX"),
        ("onnxruntime", "run the exported model"),
    ):
        require(module, "demo", purpose)
    import_peft()


def cells(row: Row) -> list[str]:
    """One line of the table, by `COLUMNS`."""
    return [
        row.name,
        f"{row.accuracy:.1%}",
        f"{row.original_accuracy:.1%}",
        f"{row.parameters:,}",
        "–" if row.file_bytes is None else bytes_text(row.file_bytes),
        bytes_text(row.saved_bytes),
        f"{row.step_ms:.1f} ms",
        "–" if row.compiled_ms is None else f"{row.compiled_ms:.1f} ms",
    ]


def table(result: DemoResult) -> Table:
    """The comparison for the terminal."""
    title = "digits: a small vision transformer, adapted to shifted domain A"
    shown = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False)
    for column in NARROW:
        shown.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in result.rows:
        shown.add_row(*cells(row), style="bold" if row.name == ONE_LORA else None)
    return shown


def text(result: DemoResult) -> str:
    """What else was found, and the files."""
    paragraphs = [*findings(result), *losses(result), deployed(result), engine(result), swapped(result)]
    files = "\n".join(f"  {file}" for file in result.files)
    return "\n".join([*paragraphs, f"{result.seconds['total']:.0f} s on {place(result)}. Written:", files])


def place(result: DemoResult) -> str:
    """The machine in a few words."""
    where = result.machine
    return f"{where['cores']} CPU cores ({where['threads']} threads), torch {where['torch']}"


def findings(result: DemoResult) -> list[str]:
    """What 1LoRA gives, in sentences."""
    one, base, full = result.row(ONE_LORA), result.row(BASE), result.row("full fine-tuning")
    assert one.file_bytes is not None
    assert full.file_bytes is not None
    miss = result.row("MiSS r=1")
    return [
        f"1LoRA takes the accuracy on domain A from {base.accuracy:.1%} to {one.accuracy:.1%} with "
        f"{one.parameters:,} trained numbers, {one.parameters / full.parameters:.1%} of full fine-tuning's; its file "
        f"has {bytes_text(one.file_bytes)} instead of {bytes_text(full.file_bytes)}.",
        f"1LoRA and MiSS r=1 are the same map, W + b 1ᵀ; they differ by {abs(one.accuracy - miss.accuracy):.1%} here "
        "(1LoRA was trained compiled, MiSS in eager: the rounding differs).",
        f"1LoRA keeps {_more(one.saved_bytes, base.saved_bytes)} for backward than the frozen base with a gradient "
        "to its input, which is the floor.",
    ]


def losses(result: DemoResult) -> list[str]:
    """Where 1LoRA is behind, in sentences; from the same numbers."""
    one = result.row(ONE_LORA)
    rest = [row for row in result.rows if row.name not in (ONE_LORA, BASE, "MiSS r=1")]
    sentences = [
        _behind("is less accurate than", [f"{r.name} ({r.accuracy:.1%})" for r in rest if r.accuracy > one.accuracy]),
        _behind(
            "saves more for backward than",
            [f"{r.name} ({bytes_text(r.saved_bytes)})" for r in rest if r.saved_bytes < one.saved_bytes],
        ),
        _behind(
            "takes longer per eager step than",
            [f"{r.name} ({r.step_ms:.1f} ms)" for r in rest if r.step_ms < one.step_ms],
        ),
        _behind(
            "trains more numbers than", [f"{r.name} ({r.parameters:,})" for r in rest if r.parameters < one.parameters]
        ),
    ]
    why = (
        "One direction per linear is little freedom, and a layer norm takes most of it away: where all its weights "
        "are equal, its outputs sum to a constant, so that the feature sum tells the next linear nothing. Training "
        "the norms too, 1LoRA(norms), undoes that."
    )
    return [sentence for sentence in sentences if sentence] + [why]


def deployed(result: DemoResult) -> str:
    """The ONNX file, in a sentence."""
    onnx = result.onnx
    return (
        f"ONNX: the vectors are folded into the weights; {onnx.nodes} nodes ({onnx.base_nodes} without an adapter), "
        f"{bytes_text(onnx.bytes)} ({bytes_text(onnx.base_bytes)}). ONNX Runtime: {onnx.accuracy:.1%}, PyTorch eager: "
        f"{onnx.eager_accuracy:.1%}; largest difference {onnx.difference:.1e} in logits of up to "
        f"{onnx.largest_logit:.0f}."
    )


def engine(result: DemoResult) -> str:
    """The engine, in a sentence."""
    one = result.engine
    if one.why_not:
        return f"TensorRT: no engine was built: {one.why_not}."
    return (
        f"TensorRT: an engine of the ONNX file for {', '.join(one.targets)}, built by {one.built_by} without a GPU in "
        f"{one.build_seconds:.1f} s, {bytes_text(one.bytes)}; {one.kernels} kernels ({one.base_kernels} without an "
        "adapter). It was not run here."
    )


def swapped(result: DemoResult) -> str:
    """The swaps, in a sentence."""
    swap = result.swap
    own = ", ".join(f"{name} {value:.1%}" for name, value in swap.accuracies.items())
    crossed = ", ".join(f"{name} {value:.1%}" for name, value in swap.crossed.items())
    same = "exactly the base" if swap.disabled_is_base else "NOT exactly the base"
    return (
        f"Swapping: {swap.loads} loads into one compiled model, {swap.milliseconds:.1f} ms each, {swap.recompiled} "
        f"graphs compiled meanwhile. Each adapter on its own domain: {own}; on the other's: {crossed}. Disabled, the "
        f"model is {same} (compiled: {swap.disabled_difference:.0e} off by rounding)."
    )


def _behind(how: str, others: list[str]) -> str:
    return f"It {how} {', '.join(others)}." if others else ""


def _more(size: int, floor: int) -> str:
    share = size / floor - 1.0
    return f"{abs(share):.1%} {'more' if share >= 0 else 'less'}"
