"""Ways out of PyTorch: adapted models as files for ONNX Runtime (and, by ONNX, TensorRT)."""

from onelora_compile.exporters.onnx import ExportReport, export_onnx
from onelora_compile.exporters.verify import Parity, check_onnx

__all__ = ["ExportReport", "Parity", "check_onnx", "export_onnx"]
