"""The file with which a stock runtime takes the engine of a bundle, and the place where it looks for that.

triton      a model repository: `triton/model/config.pbtxt` and `1/model.plan` in it
deepstream  `deepstream/nvinfer.txt`, `model.plan` beside it
isaac-ros   `isaac-ros/tensor_rt.yaml`, `model.plan` beside it

Such a runtime feeds data alone, so the adapter has to be in the engine: modes fold, load and refit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from onelora_compile.errors import ConfigError
from onelora_compile.exporters.jetson.fit_model import Fitted
from onelora_compile.exporters.jetson.releases import JetPack
from onelora_compile.exporters.tensorrt.profiles import Profile
from onelora_compile.printable import shortened

LAYOUTS = ("plain", "triton", "deepstream", "isaac-ros")
_TRITON = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}  # others: INT64, BOOL ...


class Layout(NamedTuple):
    """What a stock runtime reads, as paths in the bundle: the engine, which the device puts there, and one file."""

    name: str
    plan: str
    file: str
    text: str


class Slot(NamedTuple):
    """An input or output of the engine; a size is the dimension's name where it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def layout_of(name: str, fitted: Fitted, jetpack: JetPack, profile: Profile) -> Layout | None:
    """What to write for a stock runtime; None for "plain".

    Args:
        name: of `LAYOUTS`.
        fitted: the model of the bundle.
        jetpack: whose TensorRT.
        profile: ranges of the dynamic inputs.

    Raises:
        ConfigError: no such layout, or a model that this runtime can't take; says what to do.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"layout={name!r} is not one of {', '.join(map(repr, LAYOUTS))}")
    if name == "plain":
        return None
    if fitted.traits.feeds_vectors or fitted.traits.feeds_ids:
        refit = ", bundle it with swap='refit'" if fitted.traits.feeds_vectors and jetpack.refit_individual else ""
        raise ConfigError(
            f"layout={name!r}: a stock runtime feeds data alone, and the engine of a model of mode {fitted.mode!r} "
            f"takes more{refit}; or export it with adapters='load' or 'fold'"
        )
    graph = fitted.model.graph
    inputs, outputs = ([_slot(value, jetpack) for value in values] for values in (graph.inputs, graph.outputs))
    batch = _batch(inputs, outputs, profile)
    if name == "triton":
        return Layout(name, "triton/model/1/model.plan", "triton/model/config.pbtxt", _pbtxt(inputs, outputs, batch))
    if name == "deepstream":
        return Layout(name, "deepstream/model.plan", "deepstream/nvinfer.txt", _nvinfer(inputs, profile, fitted))
    return Layout(name, "isaac-ros/model.plan", "isaac-ros/tensor_rt.yaml", _ros(inputs, outputs))


def _slot(value: object, jetpack: JetPack) -> Slot:
    name, dtype, shape = (getattr(value, key) for key in ("name", "dtype", "shape"))
    if shape is None or dtype is None:
        raise ConfigError(f"layout: {name!r} has no shape or no type in the model: export with them")
    kind = {"float": "float32", "double": "float64"}.get(text := dtype.name.lower(), text)
    if kind == "int64" and jetpack.major < 10:
        kind = "int32"  # TensorRT 8 has no other: its engine takes and gives these
    return Slot(str(name), kind, tuple(size if isinstance(size, int) else size.value or "?" for size in shape))


def _batch(inputs: Sequence[Slot], outputs: Sequence[Slot], profile: Profile) -> int:
    """The largest batch, where one dynamic dimension stands first in all inputs and outputs; 0 elsewhere."""
    first = {slot.shape[0] if slot.shape else "" for slot in (*inputs, *outputs)}
    if len(first) != 1 or not isinstance(name := first.pop(), str) or name in ("", "?"):
        return 0
    return profile[inputs[0].name][2][0]


def _pbtxt(inputs: Sequence[Slot], outputs: Sequence[Slot], batch: int) -> str:
    lines = ['name: "model"', 'backend: "tensorrt"', 'default_model_filename: "model.plan"', f"max_batch_size: {batch}"]
    for kind, slots in (("input", inputs), ("output", outputs)):
        lines += [_tensor(kind, slot, bool(batch)) for slot in slots]
    return "\n".join([*lines, ""])


def _tensor(kind: str, slot: Slot, batched: bool) -> str:
    shape = [size if isinstance(size, int) else -1 for size in slot.shape[batched:]]
    lines = [
        f"{kind} {{",
        f"  name: {_quoted(slot.name)}",
        f"  data_type: TYPE_{_TRITON.get(slot.dtype, slot.dtype.upper())}",
        f"  dims: {shape or [1]}",
    ]
    if not shape:  # Triton has no tensors without dimensions
        lines.append("  reshape { shape: [] }")
    return "\n".join([*lines, "}"])


def _nvinfer(inputs: Sequence[Slot], profile: Profile, fitted: Fitted) -> str:
    image = inputs[0]
    size = image.shape[1:]
    if len(inputs) != 1 or len(size) != 3 or size[0] not in (1, 3, 4) or not all(isinstance(one, int) for one in size):
        found = shortened([f"{slot.name} [{', '.join(map(str, slot.shape))}]" for slot in inputs])
        raise ConfigError(
            "layout='deepstream': nvinfer feeds one image [batch, 1 or 3 or 4 channels, height, width], height and "
            f"width fixed; this model takes {found}. Triton takes any: layout='triton'"
        )
    if image.dtype != "float32":
        raise ConfigError(
            f"layout='deepstream': nvinfer feeds float32, and {image.name!r} is {image.dtype}: cast in the model, or "
            "export in float32 and pass weak_fp16=True (up to TensorRT 10)"
        )
    largest = profile[image.name][2][0]
    mode = 1 if fitted.quantized else 2 if "float16" in fitted.dtypes else 0
    lines = [
        "# Pixels reach the model as net-scale-factor * (pixel - offsets): write what it was trained with, and whether",
        "# it takes RGB (model-color-format=0), BGR (1) or grey (2). Outputs are raw tensors in each frame's metadata.",
        "[property]",
        "gpu-id=0",
        "gie-unique-id=1",
        "model-engine-file=model.plan",
        f"batch-size={largest}",
        f"infer-dims={';'.join(map(str, size))}",
        f"network-mode={mode}",
        "network-type=100",
        "output-tensor-meta=1",
        "network-input-order=0",
        f"model-color-format={2 if size[0] == 1 else 0}",
        "net-scale-factor=1",
    ]
    if size[0] != 1:
        lines.append(f"offsets={';'.join(['0'] * 3)}")
    return "\n".join([*lines, ""])


def _ros(inputs: Sequence[Slot], outputs: Sequence[Slot]) -> str:
    """Parameters of the node; a single input or output has the name that NVIDIA's encoders and decoders use."""
    lines = [
        "# For isaac_ros_tensor_rt's TensorRTNode. The path is of the node's working directory, this bundle's folder;",
        "# from elsewhere: --ros-args -p engine_file_path:=/path/of/the/bundle/isaac-ros/model.plan",
        "/**:",
        "  ros__parameters:",
        '    model_file_path: ""  # an engine that does not load is an error, and is not built again by the node',
        '    engine_file_path: "isaac-ros/model.plan"',
        "    force_engine_update: false",
    ]
    for kind, slots in (("input", inputs), ("output", outputs)):
        bindings = [slot.name for slot in slots]
        tensors = [f"{kind}_tensor"] if len(slots) == 1 else bindings
        lines.append(f"    {kind}_tensor_names: {_quoted(tensors)}")
        lines.append(f"    {kind}_binding_names: {_quoted(bindings)}")
    return "\n".join([*lines, ""])


def _quoted(value: str | list[str]) -> str:
    return json.dumps(value, ensure_ascii=False)
