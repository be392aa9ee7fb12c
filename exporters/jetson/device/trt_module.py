"""The module `tensorrt` (or `tensorrt_rtx`) of this device, and its logger."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from .core.logger import logger
from .folder import BundleError
from .options import Options


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


def log(trt: Any, options: Options) -> Any:
    """The logger of the process, with no message of an earlier call."""
    found = logger(trt)
    found.messages.verbose = options.verbose
    found.messages.clear()
    return found
