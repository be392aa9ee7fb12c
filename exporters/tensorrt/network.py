"""From an ONNX model to TensorRT's network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelora_compile.errors import ConfigError, ExportError, require
from onelora_compile.exporters.jetson.device.core.build import Build, can_refit
from onelora_compile.exporters.tensorrt.library import Api
from onelora_compile.exporters.tensorrt.profiles import Dims
from onelora_compile.exporters.tensorrt.vectors import Prepared
from onelora_compile.printable import shortened

if TYPE_CHECKING:
    import onnx_ir


def parse(build: Build, model: Prepared) -> None:
    """Read a model into the network.

    Raises:
        Refused: TensorRT can't read it.
    """
    if not model.changed:
        build.parse(str(model.path))
        return
    ir: Any = require("onnx_ir", "onnx", "read an ONNX model")
    build.parse(str(model.path), ir.to_proto(model.model).SerializeToString())


def check_inputs(network: Any, model: Prepared, onnx: Path) -> None:
    """Whether the vectors arrived as inputs: where they did not, the engine would drop adapters in silence."""
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    if model.mode == "input" and (missing := sorted(set(model.vectors) - names)):
        raise ExportError(f"{onnx}: TensorRT did not take the vectors {shortened(missing)} as inputs")


def dims_of(model: onnx_ir.Model, network: Any) -> dict[str, Dims]:
    """Of each input of the network; the names of dynamic dimensions are the ONNX model's."""
    known = {value.name: value.shape for value in model.graph.inputs}
    found: dict[str, Dims] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes, named = list(tensor.shape), known.get(tensor.name)
        names = ["?"] * len(sizes) if named is None else [getattr(size, "value", size) or "?" for size in named]
        found[tensor.name] = tuple(
            str(name) if size < 0 else int(size) for size, name in zip(sizes, names, strict=True)
        )
    return found


def mark_refittable(build: Build, api: Api, model: Prepared) -> None:
    """Let the vectors be replaced in the engine, and nothing else.

    Raises:
        ExportError: a vector that this TensorRT can't mark.
    """
    if refused := build.refittable(list(model.vectors)):
        raise ExportError(f"{api.title} can't make the vectors {shortened(refused)} refittable; use adapters='input'")


def check_refit(api: Api) -> None:
    """Whether single weights can be made refittable.

    Raises:
        ConfigError: they can't.
    """
    if not can_refit(api.trt):
        raise ConfigError(
            f"adapters='refit' needs TensorRT 10.2 or newer, which can make single weights refittable; {api.title} "
            "can't, and with all weights refittable an engine is slower and may be wrong. Use adapters='input': it "
            "swaps without refit on every version"
        )
