"""What TensorRT's network has of an ONNX model: inputs, and which of their sizes are dynamic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelora_compile.errors import ExportError
from onelora_compile.exporters.tensorrt.profiles import Dims
from onelora_compile.exporters.tensorrt.vectors import Prepared
from onelora_compile.printable import shortened

if TYPE_CHECKING:
    import onnx_ir


def check_inputs(network: Any, model: Prepared, onnx: Path) -> None:
    """Whether the vectors arrived as inputs: where they did not, the engine would drop adapters in silence."""
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    if model.traits.feeds_vectors and (missing := sorted(set(model.vectors) - names)):
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
