"""TensorRT's Python module, whichever is installed: `tensorrt` 8.5 to 11, or `tensorrt_rtx`.

Both have one API, of which versions have more or less.  What a version can is asked of its names (`Api.flag`), never of
its number: a missing `BuilderFlag.FP16` once made engines of float32 where nobody wanted them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import platform
from typing import Any

from onelora_compile.errors import ConfigError, MissingExtraError
from onelora_compile.exporters.jetson.device.core.logger import Messages, flag, logger

FLAVOURS = {"tensorrt": ("tensorrt",), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
TITLES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}


@dataclasses.dataclass(frozen=True)
class Api:
    """One of the two products, imported.

    Attributes:
        flavour: "tensorrt" or "rtx".
        trt: the module.
        logger: the one logger of this process for this product.
        messages: what arrives there.
    """

    flavour: str
    trt: Any
    logger: Any
    messages: Messages

    @property
    def title(self) -> str:
        """Name and version, for people."""
        return f"{TITLES[self.flavour]} {self.version}"

    @property
    def version(self) -> str:
        """Of the library, for example "10.3.0"."""
        return str(self.trt.__version__)

    def flag(self, enum: str, name: str) -> Any:
        """A member of an enum, None where this version has no such enum or member."""
        return flag(self.trt, enum, name)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The targets ("sm_86") that this product builds for without the GPU; none for full TensorRT."""
        members = getattr(getattr(self.trt, "ComputeCapability", None), "__members__", {})
        return tuple(f"sm_{name.removeprefix('SM')}" for name in members if name.startswith("SM"))


def find_api(flavour: str = "auto", cross: bool = False) -> Api:
    """Import TensorRT.

    Args:
        flavour: "tensorrt", "rtx", or "auto" for the one that is installed.
        cross: whether devices are asked for that are not in this machine. Where both are installed, "auto" is TensorRT,
            or TensorRT-RTX if this is true: only that can.

    Raises:
        MissingExtraError: none is installed, or what is installed does not load; the message says why and what to do.
        ConfigError: an unknown flavour.
    """
    if flavour not in ("auto", *FLAVOURS):
        raise ConfigError(f"flavour={flavour!r} is not one of 'auto', {', '.join(map(repr, FLAVOURS))}")
    order = [flavour] if flavour != "auto" else ["rtx", "tensorrt"] if cross else ["tensorrt", "rtx"]
    reasons = []
    for one in order:
        for name in FLAVOURS[one]:
            try:
                return _api(one, name)
            except ModuleNotFoundError as missing:
                reasons.append(f"{name} is not installed" if missing.name == name else f"{name}: {missing}")
            except (ImportError, OSError) as broken:  # its libraries, or a library that they need, do not load
                reasons.append(f"{name} is installed and does not load: {broken}")
    raise MissingExtraError(f"no TensorRT here ({'; '.join(reasons)}). {_advice(order)}")


def _advice(order: list[str]) -> str:
    found = []
    if "tensorrt" in order:
        found.append(
            "On a Jetson it comes with JetPack (apt install python3-libnvinfer) into the system's Python: a virtual "
            "environment sees it if it was made with --system-site-packages"
            if platform.machine() == "aarch64"
            else "TensorRT comes from NVIDIA's package index"
        )
    if "rtx" in order:
        found.append(
            "TensorRT-RTX, which also builds engines on machines without a GPU (Linux x86-64): "
            "pip install 'onelora-compile[tensorrt-rtx]'"
        )
    return ". ".join(found)


@functools.cache
def _api(flavour: str, name: str) -> Api:
    """Cached for ever: the first logger of a process is the one that TensorRT uses for the rest of it."""
    trt: Any = importlib.import_module(name)
    if not hasattr(trt, "Builder") or not hasattr(trt, "OnnxParser"):
        where = getattr(trt, "__file__", None) or os.fspath(next(iter(getattr(trt, "__path__", [])), "?"))
        raise ImportError(f"{where} has no builder and no ONNX parser: it is another package of that name")
    log = logger(trt)
    return Api(flavour, trt, log, log.messages)
