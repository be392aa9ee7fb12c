"""The tests that need a GPU; on a CPU the same are skipped, which shows that they are found."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def rows(device: str, small: bool) -> Iterator[Row]:
    del device
    chosen = ["tests/kernels/test_gpu.py"] if small else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=50", *chosen],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield {"what": "test", "failed": 1, "note": line[:300]}
    yield {"what": "tests", "note": lines[-1][:300], "returncode": done.returncode} | counts
