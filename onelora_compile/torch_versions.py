"""The PyTorch releases that every test has passed on."""

from __future__ import annotations

import re
import warnings

from onelora_compile.errors import OneLoRAWarning

TESTED = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")


def warn_if_untested(version: str) -> None:
    """Warn if a PyTorch is older or newer than all that were tested; a patch release is like its siblings."""
    found = re.match(r"(\d+)\.(\d+)", version)
    minors = [tuple(int(part) for part in one.split(".")[:2]) for one in TESTED]
    if found is None or not minors[0] <= (int(found[1]), int(found[2])) <= minors[-1]:
        warnings.warn(
            f"onelora-compile was tested with PyTorch {TESTED[0]} to {TESTED[-1]}, this is {version}: graphs may hold "
            "spellings that no pass knows yet. `onelora doctor` and `explain` show whether yours are understood",
            OneLoRAWarning,
            stacklevel=3,
        )
