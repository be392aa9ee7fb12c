"""Ways out of PyTorch: adapted models as files for ONNX Runtime, TensorRT and what reads programs of torch.export."""

from onelora_compile.exporters.calls.compare import Parity
from onelora_compile.exporters.fold.fold import fold_onnx
from onelora_compile.exporters.fold.report import FoldReport
from onelora_compile.exporters.half.report import RangeReport, ranges
from onelora_compile.exporters.jetson.bundle import bundle
from onelora_compile.exporters.jetson.bundle_report import BundleReport
from onelora_compile.exporters.jetson.signing import sign_adapter
from onelora_compile.exporters.onnx_runtime.calibration_reader import calibration_reader
from onelora_compile.exporters.onnx_runtime.convert_adapter import convert_adapter
from onelora_compile.exporters.onnx_runtime.runner import OnnxRunner
from onelora_compile.exporters.onnx_runtime.verify import Verification, verify
from onelora_compile.exporters.tensorrt.build import EngineReport, build_engine
from onelora_compile.exporters.tensorrt.refit import RefitReport, refit_engine
from onelora_compile.exporters.tensorrt.runner import EngineRunner
from onelora_compile.exporters.to_onnx.export import export_onnx
from onelora_compile.exporters.to_program.export import export_program
from onelora_compile.exporters.to_program.export_runtime import export_runtime
from onelora_compile.exporters.to_program.report import ExportReport

__all__ = [
    "BundleReport",
    "EngineReport",
    "EngineRunner",
    "ExportReport",
    "FoldReport",
    "OnnxRunner",
    "Parity",
    "RangeReport",
    "RefitReport",
    "Verification",
    "build_engine",
    "bundle",
    "calibration_reader",
    "convert_adapter",
    "export_onnx",
    "export_program",
    "export_runtime",
    "fold_onnx",
    "ranges",
    "refit_engine",
    "sign_adapter",
    "verify",
]
