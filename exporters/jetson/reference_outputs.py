"""What a model computes, stored for a comparison elsewhere: inputs, and outputs with every adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onelora_compile.errors import ConfigError, ExportError, require
from onelora_compile.exporters.jetson.device.core.modes import BASE, IDS
from onelora_compile.exporters.jetson.device.tensors import Tensor, safetensors_bytes
from onelora_compile.exporters.onnx_runtime.runner import OnnxRunner
from onelora_compile.exporters.tensorrt.profiles import Profile

_KINDS = {"float": np.float32, "double": np.float64, "float16": np.float16, "bool": np.bool_}

Swap = Mapping[str, np.ndarray] | Path | int | None
Swaps = Mapping[str, Swap]


Cases = Mapping[str, Mapping[str, np.ndarray]]


def reference_runner(source: Path) -> OnnxRunner:
    """The original model, before anything was done to it for TensorRT."""
    require("onnxruntime", "onnx", "make reference tensors (or pass selftest=False)")
    return OnnxRunner(source)


def reference_inputs(
    runner: OnnxRunner, profile: Profile, given: Mapping[str, Any] | None
) -> dict[str, dict[str, np.ndarray]]:
    """The inputs of each case: "given", or "opt" and, where it is another shape, "min".

    Args:
        runner: the original model.
        profile: ranges of the dynamic inputs.
        given: arrays by name for one case; None draws random ones: floats from a normal distribution, integers 0 and 1.

    Raises:
        ConfigError: other inputs than the model's, or of shapes outside of the profile.
    """
    if given is not None:
        return {"given": _checked(runner, profile, given)}
    cases = {"opt": _draw(runner, profile, 1)}
    if any(low != best for low, best, _ in profile.values()):
        cases["min"] = _draw(runner, profile, 0)
    return cases


def reference_cases(runner: OnnxRunner, cases: Cases, swaps: Swaps) -> dict[str, bytes]:
    """The content of a safetensors file for each case.

    Args:
        runner: as above.
        cases: the inputs.
        swaps: for each adapter, its vectors, its file, or its id in a bank; None is the model as it is.

    Raises:
        ExportError: ONNX Runtime can't run the model.
    """
    return {case: safetensors_bytes(_run(runner, inputs, swaps)) for case, inputs in cases.items()}


def _run(runner: OnnxRunner, inputs: Mapping[str, np.ndarray], swaps: Swaps) -> dict[str, Tensor]:
    tensors, entries = {f"inputs/{name}": Tensor.of(value) for name, value in inputs.items()}, 0
    for adapter, swap in swaps.items():
        if isinstance(swap, (int, Path)):
            chosen = runner.with_adapter(swap)
        else:
            chosen = runner if swap is None else runner.with_vectors(dict(swap))
        for name, value in zip(runner.output_names, chosen.run(inputs), strict=True):
            if not np.isfinite(value).all():
                raise ExportError(
                    f"output {name!r} is NaN or infinite with adapter {adapter!r} on the reference inputs: give "
                    "inputs= of the kind that the model was made for, or selftest=False"
                )
            tensors[f"outputs/{adapter}/{name}"] = Tensor.of(np.asarray(value))
            entries += value.size
    if not entries:
        raise ExportError("every output is empty on the reference inputs: give inputs= with rows, or selftest=False")
    return tensors


def _draw(runner: OnnxRunner, profile: Profile, which: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    drawn: dict[str, np.ndarray] = {}
    for name, kind, shape in _inputs(runner):
        size = profile[name][which] if name in profile else shape
        if kind in ("float", "double", "float16"):
            drawn[name] = generator.normal(size=size).astype(_KINDS[kind])
        elif kind == "bool" or "int" in kind:
            drawn[name] = generator.integers(0, 2, size).astype(_KINDS.get(kind, kind))
        else:
            raise ConfigError(f"input {name!r} is of {kind}: give inputs=, random ones are for numbers")
    return drawn


def _checked(runner: OnnxRunner, profile: Profile, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    known = {name: shape for name, _, shape in _inputs(runner)}
    if set(given) != set(known):
        raise ConfigError(f"inputs: the model takes {', '.join(known)}; given were {', '.join(given)}")
    arrays = {name: _array(given[name], shape) for name, shape in known.items()}
    for name, array in arrays.items():
        low, _, high = profile.get(name, (known[name],) * 3)
        if array.ndim != len(low) or any(not a <= b <= c for a, b, c in zip(low, array.shape, high, strict=True)):
            wanted = f"outside of {list(low)} to {list(high)}" if low != high else f"and the model takes {list(low)}"
            raise ConfigError(f"inputs: {name!r} is {list(array.shape)}, {wanted}")
    return arrays


def _array(value: Any, shape: Sequence[Any]) -> np.ndarray:
    """The array of an input; one number in [1], [1, 1] ... is the number that an input without dimensions takes."""
    array = np.asarray(value, order="C")  # `ascontiguousarray` gives numbers a dimension
    return array.reshape(()) if not shape and array.size == 1 else array


def _inputs(runner: OnnxRunner) -> list[tuple[str, str, tuple[Any, ...]]]:
    own = set(runner.input_names) - {IDS}
    return [
        (node.name, node.type.removeprefix("tensor(").removesuffix(")"), tuple(node.shape))
        for node in runner.session.get_inputs()
        if node.name in own
    ]


def default_swaps(runner: OnnxRunner, files: Mapping[str, Path]) -> dict[str, Swap]:
    """How to run the model with each adapter that a bundle of it has."""
    traits, shapes = runner.metadata.traits, runner.metadata.vectors
    if traits.feeds_ids:
        return {"base": -1, **{name: index for index, name in enumerate(runner.metadata.adapters)}}
    if traits.fixed:
        return {("base" if traits is BASE else "folded"): None}
    if runner.metadata.trained:  # the base's values of these are nowhere
        return {"default": None, **files}
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return {"default": None, "base": base, **files}
