"""torch.onnx keeps the small number that guards a division.

onnxscript's rules drop `x + 0`, and take 1e-8 for the zero: `h / (h.norm() + 1e-8)` then gives NaN for a row of zeros.
"""

from __future__ import annotations

import contextlib
import math
import types
import warnings
from collections.abc import Iterator
from typing import Any

from onelora_compile.errors import OneLoRAWarning, require


@contextlib.contextmanager
def small_constants_kept() -> Iterator[None]:
    """Let the rules take zero alone for zero; what else converts meanwhile keeps its constants, too.

    Warns: OneLoRAWarning where onnxscript compares in another way than 0.5 to 0.7.
    """
    matcher: Any = require("onnxscript.rewriter._matcher", "onnx", "export to ONNX")
    if not hasattr(matcher, "math"):
        warnings.warn(
            "this onnxscript compares constants in a way that is not known here (0.5 to 0.7 are): it may drop numbers "
            "of 1e-8 and below that guard a division",
            OneLoRAWarning,
            stacklevel=2,
        )
        yield
        return
    before = matcher.math
    matcher.math = types.SimpleNamespace(isclose=_close)
    try:
        yield
    finally:
        matcher.math = before


def _close(a: float, b: float, rel_tol: float, abs_tol: float) -> bool:
    return math.isclose(a, b, rel_tol=rel_tol)
