"""The package as it is installed, for mkdocstrings, which reads the sources and does not run them.

setuptools maps `passes/` and `exporters/` into `onelora_compile`; in the repository they stand beside it. So what is
read is a copy in that shape. (Links would do, but mkdocstrings does not follow links to folders.)
"""

from __future__ import annotations

import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parents[1]
_copy = tempfile.TemporaryDirectory()  # lives as long as the build


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Tell mkdocstrings where the package is; called by mkdocs."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for name, folder in folders.items():
        target = Path(_copy.name, *name.split("."))
        shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_copy.name]
    return config
