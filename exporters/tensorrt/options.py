"""Options of a build: for which GPUs, and how the builder may search."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onelora_compile.errors import ConfigError
from onelora_compile.exporters.tensorrt.library import Api
from onelora_compile.weights.atomic_write import replacing


def targets_of(target: str | Sequence[str] | None) -> tuple[str, ...]:
    """Targets in the form "sm_86".

    Raises:
        ConfigError: something else.
    """
    given = [] if target is None else [target] if isinstance(target, str) else list(target)
    found = []
    for one in given:
        digits = str(one).lower().removeprefix("sm").lstrip("_").replace(".", "")
        if not digits.isdecimal():
            raise ConfigError(f"target={one!r} is not of the form 'sm_86'")
        found.append(f"sm_{digits}")
    return tuple(dict.fromkeys(found))


def check_targets(api: Api, targets: tuple[str, ...]) -> None:
    """Whether this TensorRT builds for these GPUs.

    Raises:
        ConfigError: it does not; the message says for which, and what to do.
    """
    if api.capabilities:
        if unknown := [one for one in targets if one not in api.capabilities]:
            raise ConfigError(
                f"{api.title} builds for {', '.join(api.capabilities)}, not for {', '.join(unknown)}. Engines for "
                "Jetson "
                "(sm_72, sm_87, sm_110) and for data centres are built on the device, by its own TensorRT; sm_86 is "
                "the "
                "nearest to try a model for Orin with"
            )
    elif targets and (here := target_here(api)) != targets:
        found = f"the GPU here is {here[0]}" if here else "no GPU was found here"
        raise ConfigError(
            f"{api.title} builds for the GPU at hand only, and target={list(targets)} was asked for; {found}. Build "
            "there, "
            "or with flavour='rtx' for GPUs that TensorRT-RTX supports"
        )


def target_here(api: Api) -> tuple[str, ...]:
    """The target of the GPU at hand, where the engine is for that one."""
    if api.capabilities or not torch.cuda.is_available():
        return ()
    return ("sm_{}{}".format(*torch.cuda.get_device_capability()),)


class Options:
    """Sets the options of a builder, and records what was set."""

    def __init__(self, api: Api, builder: Any, config: Any) -> None:
        self.api = api
        self.builder = builder
        self.config = config
        self.recorded: dict[str, Any] = {}
        self.notes: list[str] = []
        self._cache: Path | None = None

    def targets(self, targets: Sequence[str]) -> None:
        """The GPUs to build for."""
        if targets and self.api.capabilities:
            self.config.num_compute_capabilities = len(targets)
            for index, one in enumerate(targets):
                capability = self.api.flag("ComputeCapability", one.replace("sm_", "SM"))
                self.config.set_compute_capability(capability, index)

    def workspace(self, limit: int | None) -> None:
        """Bytes that a layer may use."""
        if limit is None:
            return
        if limit <= 0:
            raise ConfigError(f"workspace={limit} is not a number of bytes")
        self.config.set_memory_pool_limit(self.api.trt.MemoryPoolType.WORKSPACE, limit)
        self.recorded["workspace"] = limit

    def optimization_level(self, level: int | None) -> None:
        """How long the builder searches, 0 to 5."""
        if level is None:
            return
        if not 0 <= level <= 5:
            raise ConfigError(f"optimization_level={level} is not between 0 and 5")
        if not hasattr(self.config, "builder_optimization_level"):
            raise ConfigError(f"{self.api.title} has no optimization_level: it came with TensorRT 8.6")
        self.config.builder_optimization_level = level
        self.recorded["optimization_level"] = level

    def dla(self, core: int | None) -> None:
        """Build for a deep learning accelerator, with the GPU for the rest."""
        if core is None:
            return
        count = self.builder.num_DLA_cores
        if not 0 <= core < count:
            found = f"this device has {count}" if count else "this device has none"
            raise ConfigError(f"dla_core={core}: {found}. Deep learning accelerators are in Xavier and Orin modules")
        self.config.default_device_type = self.api.trt.DeviceType.DLA
        self.config.DLA_core = core
        self.config.set_flag(self.api.trt.BuilderFlag.GPU_FALLBACK)
        self.recorded["dla_core"] = core

    def timing_cache(self, path: str | os.PathLike[str] | None) -> None:
        """Use what is in a file, if that is of this device and version."""
        if path is None:
            return
        if self.api.flavour == "rtx":  # has the calls, which do nothing
            self.notes.append("TensorRT-RTX has no timing cache: timing_cache was ignored")
            return
        data = Path(path).read_bytes() if Path(path).is_file() else b""
        cache = self.config.create_timing_cache(data)
        if cache is None or not self.config.set_timing_cache(cache, False):
            self.notes.append(f"{path} is a timing cache of another device or version: a new one was begun")
            cache = self.config.create_timing_cache(b"")
            self.config.set_timing_cache(cache, False)
        self.recorded["timing_cache"] = os.fspath(path)
        self._cache = Path(path)

    def save_timing_cache(self) -> None:
        """Write the cache back, also after a build that failed: what was timed is timed."""
        cache = self.config.get_timing_cache() if self._cache is not None else None
        if cache is not None and self._cache is not None:
            with replacing(self._cache) as beside, open(beside, "wb") as stream:
                stream.write(cache.serialize())
