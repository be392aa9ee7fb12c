"""Sessions in which any inner value of a model can be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onelora_compile.errors import ExportError, require


def measuring_session(path: Path, how: str) -> Any:
    """Open a model whose outputs are what is to be measured, quietly and with its basic optimizations alone.

    Args:
        path: of the model.
        how: how it is run and what for, as the end of "ONNX Runtime can't run the model …".

    Raises:
        ExportError: ONNX Runtime does not open it.
    """
    ort: Any = require("onnxruntime", "onnx", "measure ranges")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime can't run the model {how}: {error}") from error
