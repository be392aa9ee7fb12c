"""Calibration inputs for static quantisation, with every adapter that the ranges are to hold for.

A range that was calibrated with one adapter clips what another one adds.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from onelora_compile.errors import StateError
from onelora_compile.exporters.onnx_runtime.feeds import feeds
from onelora_compile.exporters.onnx_runtime.runner import Adapter, OnnxRunner


class CalibrationReader:
    """What `quantize_static` of onnxruntime and `quantize` of nvidia-modelopt take as `calibration_data_reader`."""

    def __init__(self, runs: Iterator[dict[str, np.ndarray]]) -> None:
        self._runs = runs

    def get_first(self) -> dict[str, np.ndarray] | None:
        """The inputs of the next run, which stays the next; modelopt asks for one before it calibrates."""
        first = self.get_next()
        if first is not None:
            self._runs = itertools.chain([first], self._runs)
        return first

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The inputs of the next run, vectors and ids included; None after the last."""
        return next(self._runs, None)


def calibration_reader(
    onnx: str | os.PathLike[str], inputs: Any, adapters: Sequence[str | os.PathLike[str]] = ()
) -> CalibrationReader:
    """Every input with every adapter, so that one calibration holds for all of them.

    Args:
        onnx: a model of `export_onnx` in float32.
        inputs: one input or several, as `calibration` of `fold_onnx`.
        adapters: for mode "input", adapter files beside the one that the model was exported with. A bank is calibrated
            with all of its adapters and with the base, "fold" as it is.

    Raises:
        StateError: mode "load", whose vectors can't be given to a run; adapters for a model that takes none.
        ConfigError: other inputs than the model takes, when they are read.
        AdapterFileError, BaseMismatchError: an adapter does not belong to the model.
    """
    runner = OnnxRunner(onnx)
    if runner.metadata.traits.rebuilds:
        raise StateError(f"{onnx} is of mode 'load', whose weights change with the adapter: fold, then quantise that")
    if adapters and not runner.metadata.traits.takes_files:
        raise StateError(f"{onnx} takes no adapter files (mode {runner.mode!r}): calibrate it as it is")
    chosen: list[Adapter | int] = [None, *adapters]
    if runner.metadata.traits.feeds_ids:
        chosen = [-1, *range(len(runner.metadata.adapters))]
    runners = [runner.with_adapter(one) if one is not None else runner for one in chosen]
    return CalibrationReader(_runs(runners, inputs))


def _runs(runners: Sequence[OnnxRunner], inputs: Any) -> Iterator[dict[str, np.ndarray]]:
    for feed in feeds(inputs, runners[0].input_names):
        for runner in runners:
            yield runner.feed(feed)
