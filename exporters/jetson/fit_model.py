"""Make an ONNX model one that a certain TensorRT takes, or say by name what it would not take.

vectors as inputs with defaults   TensorRT takes a default for a constant and drops the input: the defaults go
opset above the parser's          lowered (lower_opset.py)
graphs that it computes wrong     rewritten to the same function (the room `faults`)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onelora_compile.errors import ConfigError, ExportError, require
from onelora_compile.exporters.faults.rewrite import rewrite_for
from onelora_compile.exporters.jetson.device.core.modes import MODES, HasMode
from onelora_compile.exporters.jetson.releases import JetPack
from onelora_compile.exporters.onnx_file.load import load_model, read_tensor
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.exporters.opsets.lower import lower_opset
from onelora_compile.printable import shortened

if TYPE_CHECKING:
    import onnx_ir

_INFERRED_IR = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}  # ONNX IR version by opset


@dataclasses.dataclass
class Fitted(HasMode):
    """A model for TensorRT.

    Attributes:
        model: ready to be written.
        metadata: what the file said about its vectors.
        mode: "fold", "load", "input", "bank", "refit" or "base".
        values: the vectors that the file came with, float32 by name; empty if they are not swappable here.
        dtypes: of its numbers, those with most bytes first.
        quantized: whether it has QuantizeLinear.
        graphs: what it has of the graphs that releases of TensorRT are known to compute wrong.
        notes: what was changed, and what the user should know.
    """

    model: onnx_ir.Model
    metadata: Metadata
    mode: str
    values: dict[str, np.ndarray]
    dtypes: list[str]
    quantized: bool
    graphs: list[str]
    notes: list[str]


def fit(path: Path, jetpack: JetPack, swap: str = "auto", weak_fp16: bool = False) -> Fitted:
    """Read a model and make it fit.

    Args:
        path: an ONNX file of `export_onnx` or `fold_onnx`, or of another tool (a model without vectors then).
        jetpack: whose TensorRT.
        swap: "refit" makes vectors that are inputs constants that can be refitted; "auto" leaves them inputs.
        weak_fp16: whether TensorRT will choose float16 for a float32 model.

    Raises:
        ConfigError: refit where there is nothing to refit, or TensorRT can't.
        ExportError: TensorRT would not take the model; the message says how to export it again.
    """
    model = load_model(path)
    metadata = Metadata.from_props(dict(model.metadata_props), str(path))
    mode = _mode(metadata, jetpack, swap)
    notes: list[str] = []
    if model.functions:
        require("onnx_ir.passes.common", "onnx", "make a bundle").InlinePass()(model)
    values = _take_defaults(model, metadata, mode, notes)
    _check_domains(model)
    before = model.opset_imports.get("") or 1
    if before > jetpack.opset:
        lower_opset(model, jetpack.opset)
        notes.append(f"opset {before} lowered to {jetpack.opset}")
    dtypes = _dtypes(model)
    half = weak_fp16 or not {"float16", "bfloat16"}.isdisjoint(dtypes)
    rewritten = rewrite_for(model, jetpack.tensorrt, half, weak=weak_fp16 or (half and not jetpack.strongly_typed))
    notes += rewritten.notes
    _check_operators(model, jetpack)
    _check_dtypes(model, dtypes, jetpack)
    _forget_sources(model)
    require("onnx_ir.passes.common", "onnx", "make a bundle").RemoveUnusedNodesPass()(model)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.all_nodes())
    return Fitted(model, metadata, mode, values, dtypes, quantized, rewritten.graphs, notes)


def _mode(metadata: Metadata, jetpack: JetPack, swap: str) -> str:
    if swap not in ("auto", "input", "refit"):
        raise ConfigError(f"swap={swap!r} is not one of 'auto', 'input', 'refit'")
    if swap == "auto" or (swap == "input" and metadata.traits.feeds_vectors):
        return metadata.mode
    if not metadata.traits.feeds_vectors:
        raise ConfigError(
            f"swap={swap!r} needs a model with its vectors beside the activations: export it with adapters='input' "
            f"(the mode of this one is {metadata.mode!r})"
        )
    if not jetpack.refit_individual:
        raise ConfigError(
            f"swap='refit': TensorRT {jetpack.tensorrt} of JetPack {jetpack.version} can't refit single weights, which "
            "10.2 began with (JetPack 6.1); take swap='input', which every release can"
        )
    return "refit"


def _take_defaults(model: onnx_ir.Model, metadata: Metadata, mode: str, notes: list[str]) -> dict[str, np.ndarray]:
    """Let each name be either an input or a constant, and return the values of the vectors."""
    graph = model.graph
    values = {}
    if MODES[mode].takes_files:
        for name in metadata.vectors:
            held = graph.initializers.get(name)
            if held is None or held.const_value is None:
                raise ExportError(f"the model says that it has a vector {name!r}, but holds no value for it")
            values[name] = np.ascontiguousarray(read_tensor(held.const_value), dtype=np.float32)
    inputs = [value for value in graph.inputs if value.name in graph.initializers]
    for value in inputs:
        if MODES[mode].feeds_vectors and value.name in metadata.vectors:
            graph.initializers.pop(str(value.name))
            value.const_value = None
        else:
            graph.inputs.remove(value)
    if other := [str(value.name) for value in inputs if value.name not in metadata.vectors]:
        notes.append(f"inputs with a default value are constants for TensorRT: {shortened(other)}")
    return values


def _check_domains(model: onnx_ir.Model) -> None:
    foreign = sorted({f"{n.domain}.{n.op_type}" for n in model.graph.all_nodes() if n.domain not in ("", "ai.onnx")})
    if foreign:
        raise ExportError(
            f"TensorRT knows no operators of other runtimes: {shortened(foreign)}. Take the model before it was "
            "optimised or quantised for ONNX Runtime (QDQ form is fine)"
        )


def _check_operators(model: onnx_ir.Model, jetpack: JetPack) -> None:
    unknown = sorted({node.op_type for node in model.graph.all_nodes()} & jetpack.unknown)
    if unknown:
        raise ExportError(
            f"TensorRT {jetpack.tensorrt} of JetPack {jetpack.version} has no {shortened(unknown)}: export again with "
            f"export_onnx(..., opset_version={min(jetpack.opset, 18)}), or change that part of the model"
        )


def _dtypes(model: onnx_ir.Model) -> list[str]:
    ir = require("onnx_ir", "onnx", "make a bundle")
    found: dict[str, int] = {}
    constants = [value for value in model.graph.initializers.values() if value.const_value is not None]
    for value in [*constants, *model.graph.inputs, *model.graph.outputs]:
        tensor = value.const_value
        dtype = tensor.dtype if tensor is not None else value.dtype
        if dtype is not None and dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
            name = {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())
            found[name] = found.get(name, 0) + (tensor.nbytes if tensor is not None else 0)
    return sorted(found, key=lambda name: -found[name])


def _check_dtypes(model: onnx_ir.Model, dtypes: list[str], jetpack: JetPack) -> None:
    ends = [str(v.name) for v in [*model.graph.inputs, *model.graph.outputs] if v.dtype and v.dtype.name == "DOUBLE"]
    if ends:
        raise ExportError(
            f"TensorRT has no float64, which {shortened(ends)} are: export the model in float32 or float16"
        )
    newer = [name for name in dtypes if name not in ("float32", "float16", "float64", "int8", "uint8")]
    if newer and not jetpack.bfloat16:
        raise ExportError(
            f"TensorRT {jetpack.tensorrt} of JetPack {jetpack.version} has no {shortened(newer)}: export with "
            "dtype=torch.float16"
        )


def _forget_sources(model: onnx_ir.Model) -> None:
    """Drop what exporters note of the source code (paths of this machine), and fit the IR version to the opset."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    opset = model.opset_imports.get("") or 1
    model.ir_version = min(model.ir_version, _INFERRED_IR.get(opset, model.ir_version))
