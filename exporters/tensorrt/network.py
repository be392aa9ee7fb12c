"""From an ONNX model to TensorRT's network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelora_compile.errors import ConfigError, ExportError, require
from onelora_compile.exporters.tensorrt.library import Api
from onelora_compile.exporters.tensorrt.messages import engine_error
from onelora_compile.exporters.tensorrt.precision import Typing
from onelora_compile.exporters.tensorrt.profiles import Dims, Profile
from onelora_compile.exporters.tensorrt.vectors import Prepared
from onelora_compile.printable import shortened

if TYPE_CHECKING:
    import onnx_ir


def new_builder(api: Api) -> Any:
    """TensorRT's builder.

    Raises:
        ExportError: there is none to be had, mostly for want of a GPU.
    """
    try:
        return api.trt.Builder(api.logger)
    except (TypeError, RuntimeError) as error:  # how the binding says that the library gave nothing
        raise engine_error(f"no builder ({error})", api) from error


def new_network(api: Api, builder: Any, typing: Typing) -> Any:
    """An empty network of a typing."""
    names = ["EXPLICIT_BATCH"] + (["STRONGLY_TYPED"] if typing.strong else [])  # the first is gone in TensorRT 11
    flags = [api.flag("NetworkDefinitionCreationFlag", name) for name in names]
    return builder.create_network(sum(1 << int(flag) for flag in flags if flag is not None))


def parse(api: Api, parser: Any, model: Prepared, onnx: Path) -> None:
    """Read a model into the parser's network; the parser must live as long as the network, whose weights it holds.

    Raises:
        ExportError: TensorRT can't read it; the message names the nodes.
    """
    path = str(model.path)
    if model.changed:
        ir: Any = require("onnx_ir", "onnx", "read an ONNX model")
        parsed = parser.parse(
            ir.to_proto(model.model).SerializeToString(), path
        )  # path: external weights are beside it
    else:
        parsed = parser.parse_from_file(path)
    if not parsed:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise engine_error(f"{onnx} can't be read", api, [_parser_text(error) for error in errors])


def _parser_text(error: Any) -> str:
    where = ""
    if hasattr(error, "node_name"):  # not in 8.x
        where = f"node {error.node_name() or error.node()} ({error.node_operator()}): "
    elif error.node() >= 0:
        where = f"node {error.node()}: "
    return f"{where}{error.code().name}: {error.desc()}"


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


def add_profiles(builder: Any, config: Any, profiles: Sequence[Profile]) -> None:
    """Tell the builder the sizes of dynamic inputs."""
    for profile in profiles:
        optimization_profile = builder.create_optimization_profile()
        for name, (low, usual, high) in profile.items():
            optimization_profile.set_shape(name, low, usual, high)
        config.add_optimization_profile(optimization_profile)


def mark_refittable(api: Api, network: Any, config: Any, model: Prepared) -> None:
    """Let the vectors be replaced in the engine, and nothing else.

    Raises:
        ExportError: a vector that this TensorRT can't mark.
    """
    config.set_flag(api.flag("BuilderFlag", "REFIT_INDIVIDUAL"))
    if refused := [name for name in model.vectors if not network.mark_weights_refittable(name)]:
        raise ExportError(f"{api.title} can't make the vectors {shortened(refused)} refittable; use adapters='input'")


def check_refit(api: Api) -> None:
    """Whether single weights can be made refittable.

    Raises:
        ConfigError: they can't.
    """
    has = api.flag("BuilderFlag", "REFIT_INDIVIDUAL") is not None
    if not has or not hasattr(api.trt.INetworkDefinition, "mark_weights_refittable"):
        raise ConfigError(
            f"adapters='refit' needs TensorRT 10.2 or newer, which can make single weights refittable; {api.title} "
            "can't, "
            "and with all weights refittable an engine is slower and may be wrong. Use adapters='input': it swaps "
            "without "
            "refit on every version"
        )
