"""Converters talk; what matters of it comes back as an error or in a report."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from onelora_compile.looking.one_at_a_time import silent


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Drop what this thread prints and warns of, and what loggers of these names say below an error."""
    named = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in named]
    for logger in named:
        logger.setLevel(logging.ERROR)
    try:
        with silent("stdout"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(named, levels, strict=True):
            logger.setLevel(level)
