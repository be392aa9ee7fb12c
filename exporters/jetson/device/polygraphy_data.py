#!/usr/bin/env python3
"""The reference tensors of this folder for Polygraphy; `./polygraphy.sh` uses it.

`--data-loader-script polygraphy_data.py` takes the inputs; `polygraphy_data.py FILE.json` writes the outputs.
"""

import importlib
import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, _HERE)


def _stored() -> Any:
    return importlib.import_module("onelora_device.stored")


def _folder() -> Any:
    return importlib.import_module("onelora_device.folder").Folder(_HERE)


def load_data() -> Any:
    """What Polygraphy asks a script for: the inputs of each iteration."""
    return _stored().feeds(_folder())


def main(path: str) -> None:
    """Write the outputs for `--load-outputs`."""
    comparator = importlib.import_module("polygraphy.comparator")
    results = comparator.RunResults()
    results.append(("stored", [comparator.IterationResult(one) for one in _stored().expected(_folder())]))
    results.save(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
