"""Settings of the process and of PyTorch that code may change, put back where it did."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

Flag = tuple[Callable[[], Any], Callable[[Any], Any]]  # how to read it, and how to set it


@contextlib.contextmanager
def process_flags() -> Iterator[None]:
    """The settings stay as they are; none is written to that has not changed."""
    kept = []
    for read, write in _flags():
        with contextlib.suppress(RuntimeError, OSError):  # set by halves; a folder that is gone
            kept.append((read, write, read()))
    try:
        yield
    finally:
        for read, write, before in kept:
            if _now(read) != before:
                write(before)


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """In the dtypes that tensors have, whatever block of autocast the caller is in: it rounds products of float32."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _now(read: Callable[[], Any]) -> Any:
    with contextlib.suppress(RuntimeError, OSError):
        return read()
    return None


def _flags() -> list[Flag]:
    flags: list[Flag] = [
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (_anomaly, lambda modes: torch.set_anomaly_enabled(*modes)),
        (_default_device, torch.set_default_device),
        (lambda: dict(vars(torch._tensor_str.PRINT_OPTS)), vars(torch._tensor_str.PRINT_OPTS).update),
        (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        (lambda: list(sys.path), lambda paths: sys.path.__setitem__(slice(None), paths)),
        (sys.getrecursionlimit, sys.setrecursionlimit),
        (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        (os.getcwd, os.chdir),
    ]
    flags += [_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")]
    for device in ("cpu", "cuda"):
        flags += _autocast(device)
    if (numpy := sys.modules.get("numpy")) is not None:
        flags.append((numpy.geterr, lambda errors: numpy.seterr(**errors)))
    return flags


def _attribute(holder: Any, name: str) -> Flag:
    return lambda: getattr(holder, name), lambda value: setattr(holder, name, value)


def _autocast(device: str) -> list[Flag]:
    return [
        (lambda: torch.is_autocast_enabled(device), lambda on: torch.set_autocast_enabled(device, on)),
        (lambda: torch.get_autocast_dtype(device), lambda dtype: torch.set_autocast_dtype(device, dtype)),
    ]


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _default_device() -> torch.device | None:
    """None where nobody has set one: then no mode has to run. Source: torch/__init__.py, `get_default_device`."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device
