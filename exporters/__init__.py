"""Ways out of PyTorch: adapted models as files for ONNX Runtime and TensorRT."""

from onelora_compile.exporters.convert import convert_adapter
from onelora_compile.exporters.engine_runner import EngineRunner
from onelora_compile.exporters.fold_onnx import fold_onnx
from onelora_compile.exporters.fold_report import FoldReport
from onelora_compile.exporters.jetson import BundleReport, bundle
from onelora_compile.exporters.onnx import ExportReport, export_onnx
from onelora_compile.exporters.refit import RefitReport, refit_engine
from onelora_compile.exporters.runner import OnnxRunner
from onelora_compile.exporters.tensorrt import EngineReport, build_engine
from onelora_compile.exporters.verify import Parity, Verification, verify

__all__ = [
    "BundleReport",
    "EngineReport",
    "EngineRunner",
    "ExportReport",
    "FoldReport",
    "OnnxRunner",
    "Parity",
    "RefitReport",
    "Verification",
    "build_engine",
    "bundle",
    "convert_adapter",
    "export_onnx",
    "fold_onnx",
    "refit_engine",
    "verify",
]
