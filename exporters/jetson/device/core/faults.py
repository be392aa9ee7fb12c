"""What releases of TensorRT are known to compute wrong, or to refuse, and in which graphs.

A fault has no name that a library could be asked for, so this table alone compares versions.  It holds what users
reported and NVIDIA answered; none of it was measured here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Sequence

SPLIT_SCALE = "split_scale"
HALF_NORM = "half_norm"
LAYER_NORM = "layer_norm"
HALF_ATTENTION = "half_attention"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        graph: what a model has that meets it; `exporters/faults` finds these.
        what: the same for people.
        effect: what a user sees.
        issues: where it was reported.
        since: the first release, (10, 3).
        before: the first release without it; None while there is none.
        half: whether only float16 or bfloat16 meets it.
        sm: the only GPU that meets it, "12.0"; "" is any.
        cure: what helps on the device, where no rewrite was made.
    """

    graph: str
    what: str
    effect: str
    issues: tuple[str, ...]
    since: tuple[int, ...]
    before: tuple[int, ...] | None
    half: bool = False
    sm: str = ""
    cure: str = "make the bundle or the engine again from the ONNX model: it is rewritten on the way"

    def fits(self, version: str, sm: str = "", half: bool = True) -> bool:
        """Whether a release meets it.

        Args:
            version: of TensorRT, "10.3.0.26".
            sm: of the GPU, "8.7"; "" if that is not known.
            half: whether the engine computes in 16 bit anywhere.
        """
        here = _numbers(version)
        return (
            self.since <= here
            and (self.before is None or here < self.before)
            and (half or not self.half)
            and (not self.sm or not sm or self.sm == sm)
        )

    def __str__(self) -> str:
        return f"{self.what}: {self.effect} ({', '.join(self.issues)})"


FAULTS = (
    Fault(
        SPLIT_SCALE,
        "attention whose scale is split, as its square root on q and on k (what torch exports)",
        "wrong outputs, in float32 too",
        # Certain for 10.4 to 10.7 and right in 10.8. Of 10.3 there are wrong outputs of the same models.
        ("NVIDIA/TensorRT 4333", "4328", "4334", "4419", "4558"),
        since=(10, 3),
        before=(10, 8),
    ),
    Fault(
        HALF_NORM,
        "a norm that is written out and computed in float16",
        "NaN, or one class everywhere: its squares overflow",
        ("NVIDIA/TensorRT 3657", "4111", "4493", "4723", "onnxruntime 13639"),
        since=(8, 0),
        before=None,
        half=True,
        cure="make the bundle or the engine again from the ONNX model: it is rewritten on the way. Where TensorRT "
        "chooses the types (8.x, weak_fp16) that is no order to it: take float32 there",
    ),
    Fault(
        LAYER_NORM,
        "the operator LayerNormalization",
        "the parser refuses it",
        ("NVIDIA/TensorRT 2781", "3657"),
        since=(8, 0),
        before=(8, 6),
    ),
    Fault(
        HALF_ATTENTION,
        "fused attention in 16 bit on SM 12.0",
        "wrong outputs without a message",
        ("NVIDIA/TensorRT 4837",),
        since=(10, 8),
        before=None,
        half=True,
        sm="12.0",
        cure="export in float32 for this GPU",
    ),
)


def known(version: str, sm: str = "", half: bool = True, graphs: Sequence[str] | None = None) -> list[Fault]:
    """The faults that a release meets, of all graphs or of those that a model has."""
    return [one for one in FAULTS if one.fits(version, sm, half) and (graphs is None or one.graph in graphs)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
