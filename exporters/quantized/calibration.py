"""Measure what static quantisers have to hold, on inputs that the user gives, in ONNX Runtime.

The model is run without those quantisers (each QuantizeLinear and what reads it stand aside, but for a Relu that its
range stands for), once with the vectors and once with zeros, and its activations there are looked at.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.exporters.onnx_file.node_writer import Writer
from onelora_compile.exporters.onnx_file.save import save_model
from onelora_compile.exporters.onnx_runtime.declared import fitted, slots_of_model
from onelora_compile.exporters.onnx_runtime.feeds import NO_INPUTS, feeds
from onelora_compile.exporters.onnx_runtime.measuring import measuring_session
from onelora_compile.exporters.quantized.saturation import Quantizer

if TYPE_CHECKING:
    import onnx_ir


@dataclasses.dataclass
class Seen:
    """The activations of one quantiser over all inputs.

    Attributes:
        vectors: their smallest and largest with the vectors, float64 [2].
        plain: the same with zero vectors.
        beyond: how many values its range would clip, with the vectors.
        count: how many there were.
    """

    vectors: np.ndarray = dataclasses.field(default_factory=lambda: np.array([np.inf, -np.inf]))
    plain: np.ndarray = dataclasses.field(default_factory=lambda: np.array([np.inf, -np.inf]))
    beyond: int = 0
    count: int = 0


def measure(
    model: onnx_ir.Model,
    quantizers: Sequence[Quantizer],
    vectors: Iterable[onnx_ir.Value],
    inputs: Any,
    external: bool,
) -> tuple[list[Seen], int]:
    """What each quantiser sees, and the number of inputs.

    Args:
        model: with the vectors in it; not changed.
        quantizers: of its main graph, each with a range.
        vectors: the constants that hold the vectors of branches.
        inputs: see `fold_onnx`.
        external: whether weights go into a file beside the twin.

    Raises:
        ConfigError: there are no inputs, or they do not fit the model's.
        ExportError: ONNX Runtime can't run the twin.
    """
    twin, probes, zeroed = _twin(model, quantizers, vectors)
    names = _input_names(model)
    seen = [Seen() for _ in quantizers]
    runs = 0
    with tempfile.TemporaryDirectory(prefix="onelora-") as folder:
        save_model(twin, Path(folder) / "twin.onnx", external or None)
        session = measuring_session(Path(folder) / "twin.onnx", "without its quantisers, to measure them")
        slots = slots_of_model(model)
        for given in feeds(inputs, names):
            feed = fitted(given, slots)
            with_vectors = _run(session, probes, feed)
            plain = _run(session, probes, feed | zeroed)
            for one, quantizer, value, base in zip(seen, quantizers, with_vectors, plain, strict=True):
                _look(one, quantizer, value, base)
            runs += 1
    if not runs:
        raise ConfigError(NO_INPUTS)
    return seen, runs


def check_fits(inputs: Any, model: onnx_ir.Model) -> None:
    """Check the inputs by number and name, and run none.

    Raises:
        ConfigError: there are none, or they do not fit the model's.
    """
    if not sum(1 for _ in feeds(inputs, _input_names(model))):
        raise ConfigError(NO_INPUTS)


def _input_names(model: onnx_ir.Model) -> list[str]:
    return [value.name or "" for value in model.graph.inputs if value.name not in model.graph.initializers]


def _look(seen: Seen, quantizer: Quantizer, value: np.ndarray, base: np.ndarray) -> None:
    held = quantizer.held
    assert held is not None
    if not value.size:
        return
    if not np.isfinite(value).all():
        raise ExportError(f"{quantizer.name!r} is not finite on a calibration input")
    for ends, numbers in ((seen.vectors, value), (seen.plain, base)):
        ends[:] = min(ends[0], numbers.min()), max(ends[1], numbers.max())
    low = -np.inf if held.clips == "low" else held.low - held.step / 2
    high = np.inf if held.clips == "high" else held.high + held.step / 2
    seen.beyond += int(((value < low) | (value > high)).sum())
    seen.count += value.size


def _twin(
    model: onnx_ir.Model, quantizers: Sequence[Quantizer], vectors: Iterable[onnx_ir.Value]
) -> tuple[onnx_ir.Model, list[str], dict[str, np.ndarray]]:
    """The model without its quantisers, the outputs to look at, and zeros for the inputs that vectors became."""
    twin = model.clone()
    same = dict(zip(model.graph.all_nodes(), twin.graph.all_nodes(), strict=True))
    writer = Writer(twin)
    for quantizer in quantizers:
        if not quantizer.fixed:
            _stand_aside(quantizer, same, writer)
    probes = []
    for quantizer in quantizers:
        source = same[quantizer.node].inputs[0]
        assert source is not None
        if source.dtype is None:
            source.dtype = writer.ir.DataType.FLOAT
        if not source.is_graph_output():
            twin.graph.outputs.append(source)
        probes.append(source.name or "")
    zeroed = {}
    for value in vectors:
        own = twin.graph.initializers.get(value.name or "")
        if own is not None and own.const_value is not None:  # not one of a body
            twin.graph.inputs.append(own)
            zeroed[own.name or ""] = np.zeros_like(own.const_value.numpy())
    twin.ir_version = max(twin.ir_version, 4)
    return twin, probes, zeroed


def _stand_aside(quantizer: Quantizer, same: Mapping[onnx_ir.Node, onnx_ir.Node], writer: Writer) -> None:
    node = same[quantizer.node]
    value = node.inputs[0]
    assert value is not None
    assert quantizer.held is not None
    dtype = quantizer.readers[0].outputs[0].dtype if quantizer.readers else value.dtype
    after, turned = writer.behind(value, node.graph), quantizer.held.clips == "high"  # type: ignore[arg-type]
    if quantizer.held.clips:
        for op_type in ("Neg", "Relu", "Neg") if turned else ("Relu",):
            value = writer.add(after, op_type, value, dtype=value.dtype)
            after = writer.made(value)
    for old in quantizer.between:
        for output in same[old].outputs:
            if dtype is not None:
                output.dtype = dtype
    node.outputs[0].replace_all_uses_with(value)
    for reader in quantizer.readers:
        own = same[reader]
        source = own.inputs[0]
        assert source is not None
        own.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
        assert own.graph is not None
        own.graph.remove(own, safe=True)


def _run(session: Any, probes: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return [np.asarray(value, np.float64) for value in session.run(list(probes), dict(feed))]
    except Exception as error:
        raise ConfigError(f"ONNX Runtime can't run a calibration input: {error}") from error
