#!/usr/bin/env python3
"""Build, test, measure and update the model of this folder: `python3 build_and_run.py --help`."""

import importlib
import os
import sys

if sys.version_info < (3, 8):  # noqa: UP036  # JetPack 4 has 3.6
    sys.exit("error: Python 3.8 or newer is needed, this is " + sys.version.split()[0])

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    sys.exit(importlib.import_module("onelora_device.commands").main())
