"""What a run says of each claim: it holds, it does not, or it was not run.

Each claim names the rows that it is about; a claim without rows was not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

HOLDS, BROKEN, NOT_RUN = "holds", "does not hold", "not run"
OWN = "1LoRA"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of the documents that a GPU can prove.

    Attributes:
        text: the sentence.
        rows: which rows are about it.
        holds: whether one of them agrees.
        shows: the number of a row that decides.
    """

    text: str
    rows: Callable[[Row], bool]
    holds: Callable[[Row], bool]
    shows: Callable[[Row], str]


def _is(**wanted: Any) -> Callable[[Row], bool]:
    return lambda row: all(row.get(key) == value for key, value in wanted.items())


def _compiled_step(row: Row) -> bool:
    return _is(part="training", mode="compiled", way=OWN)(row) and "peak_ratio" in row


def _engine(row: Row) -> bool:
    return _is(part="engines", what="engine")(row)


CLAIMS = (
    Claim(
        "One function: a compiled block computes (W + b 1ᵀ) x + c after each of twelve switches, and the base's in a "
        "disabled block (error at most twice that of plain PyTorch)",
        _is(part="swaps", what="switch"),
        lambda row: row["error_ratio"] <= 2,
        lambda row: f"{row['error_ratio']:.2f} of the error of plain PyTorch",
    ),
    Claim(
        "Values change, graphs don't: switches compile nothing, under CUDA graphs too",
        _is(part="swaps", what="switch"),
        lambda row: row["new_graphs"] == row["new_addresses"] == 0,
        lambda row: f"{row['new_graphs']} new graphs, {row['new_addresses']} new addresses",
    ),
    Claim(
        "The memory of the frozen base in training, compiled (peak within 5 %; a DiT a fifth more)",
        _compiled_step,
        lambda row: row["peak_ratio"] <= (1.25 if row["block"] == "DiT-XL" else 1.05),
        lambda row: f"peak {row['peak_ratio']:.3f} of the frozen base's",
    ),
    Claim(
        "A compiled step costs at most 5 % more than the frozen base's",
        _compiled_step,
        lambda row: row["ratio"] <= 1.05,
        lambda row: f"{row['ratio']:.3f} of the frozen base's time",
    ),
    Claim(
        "A compiled step is not slower than with PEFT's MiSS or LoRA of r=1",
        lambda row: _compiled_step(row) and "rival_ratio" in row,
        lambda row: row["ratio"] <= 1.01 * row["rival_ratio"],
        lambda row: f"{row['ratio']:.3f}, the better of them {row['rival_ratio']:.3f}",
    ),
    Claim(
        "producer_consumer is the right rule: no other way is more than 2 % faster at any shape",
        lambda row: _is(part="lowerings", way="producer_consumer")(row) and "rival_ratio" in row,
        lambda row: row["ratio"] <= 1.02 * row["rival_ratio"],
        lambda row: f"{row['shape']}: {row['ratio']:.3f}, {row['rival']} {row['rival_ratio']:.3f}",
    ),
    Claim(
        "ONNX Runtime on the GPU computes what PyTorch does, in all four modes",
        lambda row: _is(part="onnx_cuda")(row) and "error_ratio" in row,
        lambda row: row["error_ratio"] <= 4,
        lambda row: f"{row['error_ratio']:.2f} of the error of plain PyTorch",
    ),
    Claim(
        "TensorRT engines are right, after swaps and refits too (float16: within 1 % of the largest output)",
        _engine,
        lambda row: row["error_ratio"] <= 1e-2,
        lambda row: f"{row['way']}: {row['error_ratio']:.1e}",
    ),
    Claim(
        "Zero cost when deployed: an engine of mode fold or load is as fast as the base's (2 %)",
        lambda row: _is(part="engines", what="engine call")(row) and row["way"] in ("fold", "load"),
        lambda row: row["ratio"] <= 1.02,
        lambda row: f"{row['way']}: {row['ratio']:.3f}",
    ),
    Claim(
        "The tests that need a GPU pass",
        lambda row: _is(part="gpu_tests", what="tests")(row) and bool(row.get("passed") or row.get("failed")),
        lambda row: not row.get("failed") and not row.get("error"),
        lambda row: row["note"],
    ),
)


def prepared(rows: Sequence[Row]) -> list[Row]:
    """The rows with what claims compare: peaks over the frozen base's, the best rival of the same block or shape."""
    made = []
    for row in rows:
        row = dict(row)
        beside = [one for one in rows if _place(one) == _place(row)]
        base = next((one for one in beside if one.get("way") == "frozen base"), None)
        if base and "peak_bytes" in row:
            row["peak_ratio"] = row["peak_bytes"] / max(1, base["peak_bytes"])
        names = ("PEFT",) if row["part"] == "training" else ("Inductor", "max_autotune", "fused_kernel")
        rivals = [one for one in beside if any(name in str(one.get("way")) for name in names) and "ratio" in one]
        if rivals and "ratio" in row:
            best = min(rivals, key=lambda one: one["ratio"])
            row |= {"rival": best["way"], "rival_ratio": best["ratio"]}
        made.append(row)
    return made


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("part", "block", "shape", "mode", "what"))


def verdict(claim: Claim, rows: Sequence[Row]) -> tuple[str, str]:
    """What prepared rows say of a claim, and the number that decides."""
    about = [row for row in rows if claim.rows(row)]
    if not about:
        return NOT_RUN, ""
    broken = [row for row in about if not claim.holds(row)]
    ends = {row["part"]: row["note"] for row in rows if row.get("what") == "part"}
    cut = {ends.get(row["part"], "done") for row in about} - {"done"}
    shown = [" ".join(filter(None, (row.get("block"), row.get("mode"), claim.shows(row)))) for row in broken or about]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    counted = f"{len(broken)} of {len(about)}: " if broken else ""
    said = BROKEN if broken else f"{HOLDS} as far as it ran" if cut else HOLDS
    return said, counted + "; ".join(shown[:3]) + more
