"""The one logger of a process, and what NVIDIA's libraries said to it."""

from __future__ import annotations

import sys
from typing import Any

from .messages import Refused

_HARMLESS = ("has Int64 binding",)  # said of every input of token ids
_LOGGERS: dict[str, Any] = {}


class Messages:
    """The errors and warnings since `clear`; a large build writes hundreds of thousands of other messages.

    Attributes:
        verbose: whether to show what comes on standard error.
        errors: the texts of errors, in order.
        warnings: the texts of warnings that a user can do something about, in order.
    """

    def __init__(self) -> None:
        self.verbose = False
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def clear(self) -> None:
        """Forget everything: the next call's messages are to be told from the last one's."""
        self.errors.clear()
        self.warnings.clear()

    def add(self, severity: str, text: str) -> None:
        """One message; severity is the name of TensorRT's enum."""
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self.errors.append(text)
        elif severity == "WARNING" and not any(one in text for one in _HARMLESS):
            self.warnings.append(text)
        if self.verbose and severity != "VERBOSE":
            print(text, file=sys.stderr)


def logger(trt: Any) -> Any:
    """The logger of the process for a module: TensorRT keeps the first one that it gets, whatever it is given later.

    Its attribute `messages` holds what arrived.
    """
    if trt.__name__ not in _LOGGERS:

        class Logger(trt.ILogger):
            """Writes down what TensorRT says."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.messages = Messages()

            def log(self, severity: Any, msg: str) -> None:
                self.messages.add(severity.name, msg)

        _LOGGERS[trt.__name__] = Logger()
    return _LOGGERS[trt.__name__]


def flag(trt: Any, enum: str, name: str) -> Any:
    """A member of an enum, None where this version has no such enum or member."""
    return getattr(getattr(trt, enum, None), name, None)


def made(trt: Any, log: Any, step: str, kind: Any) -> Any:
    """What a step begins with, a `trt.Builder` or a `trt.Runtime`, and the plugins that TensorRT ships.

    Raises:
        Refused: the library gave nothing.
    """
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(log, "")
    try:
        return kind(log)
    except (TypeError, RuntimeError) as error:  # how the binding says so
        raise Refused(step, log, str(error)) from error
