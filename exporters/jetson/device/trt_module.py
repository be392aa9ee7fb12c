"""The module `tensorrt` (or `tensorrt_rtx`), its one logger, and a progress line while it builds."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from .folder import BundleError

_LOGGERS: dict[str, Any] = {}


def load(name: str) -> Any:
    """Import TensorRT.

    Raises:
        BundleError: it is not there, or its libraries are not; says what to do.
    """
    if name == "tensorrt_rtx" and importlib.util.find_spec(name) is None:
        name = "tensorrt_rtx_bindings"  # the wheel alone, without the package that only renames it
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        version = "{}.{}".format(*sys.version_info[:2])
        inside = sys.prefix != getattr(sys, "base_prefix", sys.prefix)
        if isinstance(error, ImportError) and getattr(error, "name", None) == name:
            where = (
                "This Python is in a virtual environment, which does not see JetPack's module in "
                f"/usr/lib/python{version}/dist-packages: make it with python3 -m venv --system-site-packages"
                if inside
                else "On JetPack: sudo apt install python3-libnvinfer (PyPI's package of that name is not for "
                "Jetson), and use the system's python3"
            )
            raise BundleError(f"there is no Python module {name!r} for Python {version}. {where}") from None
        raise BundleError(
            f"the module {name!r} is there, but can't be loaded: {error}. In a container: is it made for this JetPack, "
            "and started with --runtime nvidia?"
        ) from None


def logger(trt: Any, verbose: bool = False) -> Any:
    """The logger of the process: TensorRT keeps the first one that it gets, whatever it is given later."""
    if trt.__name__ not in _LOGGERS:
        quiet = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

        class Log(trt.ILogger):
            """Keeps errors for the message of an exception, and shows the rest on request."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []
                self.verbose = False

            def log(self, severity: Any, message: str) -> None:
                if severity in quiet:
                    self.errors.append(message)
                if self.verbose and severity != trt.ILogger.Severity.VERBOSE:
                    print(message, file=sys.stderr)

        _LOGGERS[trt.__name__] = Log()
    log = _LOGGERS[trt.__name__]
    log.verbose = verbose
    del log.errors[:]
    return log


def monitor(trt: Any) -> Any:
    """A progress line on a terminal, where this TensorRT tells its progress (10.0 and newer); None elsewhere."""
    if not hasattr(trt, "IProgressMonitor") or not sys.stderr.isatty():
        return None

    class Progress(trt.IProgressMonitor):
        """One line, overwritten."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: Any, num_steps: int) -> None:
            self.phases[phase_name] = max(num_steps, 1)
            self._show(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._show(phase_name, step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)
            sys.stderr.write("\r\033[K")

        def _show(self, phase: str, done: int) -> None:
            total = self.phases.get(phase, 1)
            bar = "#" * (20 * done // total)
            sys.stderr.write(f"\r\033[K[{bar:<20}] {done}/{total} {phase[:50]}")
            sys.stderr.flush()

    return Progress()
