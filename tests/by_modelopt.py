"""Quantise by nvidia-modelopt, in a process of its own: it changes onnxruntime's quantiser where it is imported."""

import multiprocessing
import sys
from typing import Any

import onnx

from onelora_compile.exporters.onnx_runtime.calibration_reader import CalibrationReader


def _quantize(source, path, kind, feeds):
    from modelopt.onnx.quantization import quantize

    reader = CalibrationReader(iter(feeds))
    options: Any = {"calibration_data_reader": reader, "calibration_eps": ["cpu"], "high_precision_dtype": "fp32"}
    quantize(str(source), quantize_mode=kind, output_path=str(path), **options)


def by_modelopt(source, path, reader, kind="int8"):
    """As docs/how-to/tensorrt.md does it: modelopt leaves the metadata out."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_quantize, (source, path, kind, list(iter(reader.get_next, None))))
    assert "modelopt" not in sys.modules
    model = onnx.load(path)
    assert not model.metadata_props
    model.metadata_props.extend(onnx.load(source).metadata_props)
    onnx.save(model, path)
