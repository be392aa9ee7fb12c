"""Options of a build: for which GPUs, and how the builder may search."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from onelora_compile.errors import ConfigError
from onelora_compile.exporters.jetson.device.core.build import Build, can_refit, has_timings
from onelora_compile.exporters.tensorrt.library import Api
from onelora_compile.weights.atomic_write import replacing


def named_targets(target: str | Sequence[str] | None) -> tuple[str, ...]:
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


def check_refit(api: Api) -> None:
    """Whether single weights can be made refittable.

    Raises:
        ConfigError: they can't.
    """
    if not can_refit(api.trt):
        raise ConfigError(
            f"adapters='refit' needs TensorRT 10.2 or newer, which can make single weights refittable; {api.title} "
            "can't, and with all weights refittable an engine is slower and may be wrong. Use adapters='input': it "
            "swaps without refit on every version"
        )


def target_here(api: Api) -> tuple[str, ...]:
    """The target of the GPU at hand, where the engine is for that one."""
    if api.capabilities or not torch.cuda.is_available():
        return ()
    return ("sm_{}{}".format(*torch.cuda.get_device_capability()),)


def set_options(api: Api, build: Build, workspace: int | None, level: int | None, dla: int | None) -> dict[str, Any]:
    """Set what the builder may use and how long it searches; returns what was set, for the manifest.

    Args:
        api: the TensorRT at hand.
        build: what is set.
        workspace: bytes that a layer may use.
        level: how long the builder searches, 0 to 5.
        dla: build for this deep learning accelerator, with the GPU for the rest.

    Raises:
        ConfigError: a value that can't be meant, or that this device or version can't take.
    """
    if workspace is not None:
        if workspace <= 0:
            raise ConfigError(f"workspace={workspace} is not a number of bytes")
        build.workspace(workspace)
    if level is not None:
        if not 0 <= level <= 5:
            raise ConfigError(f"optimization_level={level} is not between 0 and 5")
        if not build.optimization_level(level):
            raise ConfigError(f"{api.title} has no optimization_level: it came with TensorRT 8.6")
    if dla is not None:
        _set_dla(api, build.builder, build.config, dla)
    given = {"workspace": workspace, "optimization_level": level, "dla_core": dla}
    return {name: value for name, value in given.items() if value is not None}


def _set_dla(api: Api, builder: Any, config: Any, core: int) -> None:
    count = builder.num_DLA_cores
    if not 0 <= core < count:
        found = f"this device has {count}" if count else "this device has none"
        raise ConfigError(f"dla_core={core}: {found}. Deep learning accelerators are in Xavier and Orin modules")
    config.default_device_type = api.trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(api.trt.BuilderFlag.GPU_FALLBACK)


@contextlib.contextmanager
def timing_cache_of(
    api: Api, build: Build, path: str | os.PathLike[str] | None
) -> Iterator[tuple[dict[str, str], list[str]]]:
    """A block in which a build uses the timing cache in a file, which is written back.

    Yields:
        What was set, for the manifest, and notes for the user.
    """
    if path is None:
        yield {}, []
    elif not has_timings(api.trt):
        yield {}, ["TensorRT-RTX has no timing cache: timing_cache was ignored"]
    else:
        held = Path(path).read_bytes() if Path(path).is_file() else b""
        fits = build.use_timings(held)
        try:
            other = [f"{path} is a timing cache of another device or version: a new one was begun"]
            yield {"timing_cache": os.fspath(path)}, [] if fits else other
        finally:  # also after a build that failed: what was timed is timed
            if (timings := build.timings()) is not None:
                with replacing(Path(path)) as beside, open(beside, "wb") as stream:
                    stream.write(timings)
