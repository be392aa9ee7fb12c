"""The grammar of adapters with weights: PATH:WEIGHT, for `onelora combine`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from onelora_compile.errors import ConfigError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # float() would take 0_7 for 7


def parse_weighted(words: Sequence[str]) -> dict[str, float]:
    """The weights by file; what is behind the last colon is the weight, as a path may hold others.

    Raises:
        ConfigError: a word without a number, or a file twice.
    """
    found: dict[str, float] = {}
    for word in words:
        path, colon, number = word.rpartition(":")
        if not colon or not path or not _NUMBER.fullmatch(number):
            hint = f"{word}:1" if os.path.exists(word) else "a.safetensors:0.7"
            raise ConfigError(f"{word!r} is not PATH:WEIGHT, a file and a number: {hint}")
        if path in found:
            raise ConfigError(f"{path} is given twice: give it once, with the sum of its weights")
        found[path] = float(number)
    return found
