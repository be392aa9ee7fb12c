"""Ways out of PyTorch: adapted models as files for ONNX Runtime (and, by ONNX, TensorRT)."""

from onelora_compile.exporters.convert import convert_adapter
from onelora_compile.exporters.fold_onnx import FoldReport, fold_onnx
from onelora_compile.exporters.jetson import BundleReport, bundle
from onelora_compile.exporters.onnx import ExportReport, export_onnx
from onelora_compile.exporters.runner import OnnxRunner
from onelora_compile.exporters.verify import Parity, Verification, verify

__all__ = [
    "BundleReport",
    "ExportReport",
    "FoldReport",
    "OnnxRunner",
    "Parity",
    "Verification",
    "bundle",
    "convert_adapter",
    "export_onnx",
    "fold_onnx",
    "verify",
]
