"""What an engine computes in, decided before it is built and told afterwards.

Strongly typed networks (TensorRT 9.1 and newer, TensorRT-RTX) compute in the dtypes of the ONNX model.  Older ones take
float32 for everything unless flags allow less, so there half precision has to be asked for by name.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ConfigError, one_of
from onelora_compile.exporters.half.ranges import INFINITE
from onelora_compile.exporters.jetson.device.core.build import can_be_strong
from onelora_compile.exporters.onnx_file.load import read_tensor
from onelora_compile.exporters.tensorrt.library import Api

if TYPE_CHECKING:
    import onnx_ir

_WEAK = ("fp16", "bf16", "int8", "fp8")
_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8", "FP4": "float4", "INT4": "int4"}


@dataclasses.dataclass(frozen=True)
class Typing:
    """How a network is typed.

    Attributes:
        strong: by the ONNX model alone.
        flags: names of builder flags that allow other dtypes.
    """

    strong: bool
    flags: tuple[str, ...]


def typing_of(api: Api, model: onnx_ir.Model, precision: str | Sequence[str] | None) -> Typing:
    """Decide the typing.

    Args:
        api: the TensorRT at hand.
        model: its dtypes count.
        precision: None for the model's own; "fp16", "bf16", "int8", "fp8" or several of them allow these in a weakly
            typed network.

    Raises:
        ConfigError: a dtype that this TensorRT can't be allowed, or a model whose dtypes it would not keep by itself.
    """
    strong = can_be_strong(api.trt)
    asked = (precision,) if isinstance(precision, str) else tuple(precision or ())
    for one in asked:
        one_of("precision", one, _WEAK)
        if api.flag("BuilderFlag", one.upper()) is None:
            how = "export the model with dtype=torch.float16 or torch.bfloat16, or quantise the ONNX model"
            raise ConfigError(
                f"{api.title} takes dtypes from the ONNX model only and has no flag for precision={one!r}: {how}"
                if strong
                else f"{api.title} can't be allowed {one}"
            )
    if asked:
        return Typing(False, tuple(one.upper() for one in asked))
    if not strong and (needed := _needs_flags(model)):
        raise ConfigError(
            f"the model holds {', '.join(needed)}, and {api.title} is not strongly typed: without a flag it would "
            "compute "
            f"in float32. Say so: precision={_flags(needed)}"
        )
    return Typing(strong, ())


def holds_half(model: onnx_ir.Model) -> bool:
    """Whether a model has numbers of 16 bit."""
    return bool(_halves(model))


def _halves(model: onnx_ir.Model) -> list[str]:
    dtypes = [value.dtype for value in (*model.graph.inputs, *model.graph.initializers.values())]
    found = {dtype.name for dtype in dtypes if dtype is not None}
    return [name for name in ("FLOAT16", "BFLOAT16") if name in found]


def _needs_flags(model: onnx_ir.Model) -> list[str]:
    needed = _halves(model)
    quantised = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)
    return needed + (["QuantizeLinear"] if quantised else [])


def _flags(needed: Sequence[str]) -> str:
    flags = [{"FLOAT16": "fp16", "BFLOAT16": "bf16", "QuantizeLinear": "int8"}[one] for one in needed]
    return repr(flags[0]) if len(flags) == 1 else repr(tuple(flags))


def precision_text(network: Any, typing: Typing, tf32: bool) -> str:
    """What the layers of a network compute in, for people."""
    counts: collections.Counter[str] = collections.Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs and layer.type.name not in ("CONSTANT", "SHAPE", "CAST"):
            dtype = layer.get_output(0).dtype.name
            if dtype in _NAMES:
                counts[_NAMES[dtype]] += 1
    named = ", ".join(f"{name} ({count} layers)" for name, count in counts.most_common()) or "integers"
    if not typing.strong:
        allowed = " or ".join(typing.flags)
        named = f"{named}, each layer {allowed} where TensorRT prefers it" if allowed else f"{named}, weakly typed"
    if tf32 and counts["float32"]:
        named += "; float32 matmuls may run in TF32"
    return named


def precision_notes(model: onnx_ir.Model, typing: Typing) -> list[str]:
    """What the user should know of the dtypes: an engine in float32, and weights near or beyond float16's range."""
    weights = [value for value in model.graph.initializers.values() if _is_weight(value)]
    dtypes = {_dtype(value) for value in weights} & {"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"}
    notes = []
    quantised = any(node.op_type == "DequantizeLinear" for node in model.graph)
    if dtypes == {"FLOAT"} and not typing.flags and not quantised:
        notes.append("all weights are float32: for a faster engine export the model with dtype=torch.float16")
    halved = {"FLOAT16"} | ({"FLOAT"} if "FP16" in typing.flags else set())
    halves = [value for value in weights if _dtype(value) in halved]
    largest, name = max(((_largest(value), str(value.name)) for value in halves), default=(0.0, ""))
    if largest >= INFINITE:
        notes.append(f"{name} has {largest:.0f}, beyond float16 (65504): it becomes infinity in float16 layers")
    elif largest:
        notes.append(f"float16 range: the largest weight is {largest:.3g} of 65504")
    return notes


def _is_weight(value: onnx_ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) >= 2


def _dtype(value: onnx_ir.Value) -> str:
    return value.const_value.dtype.name if value.const_value is not None else ""


def _largest(value: onnx_ir.Value) -> float:
    numbers = read_tensor(value.const_value)
    finite = numbers[np.isfinite(numbers)]  # masks hold infinities on purpose
    return float(np.abs(finite).max()) if finite.size else 0.0
