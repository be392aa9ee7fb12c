"""What the values of a model are on real inputs, and what float16 would make of each.

Measured in float32, also where the file has float16: ONNX Runtime computes float16 on a CPU in float32 and drops the
casts between, so it shows neither where a GPU would overflow nor by how much.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ConfigError, require
from onelora_compile.exporters.half.retype import FLOATS, retype
from onelora_compile.exporters.onnx_file.load import read_tensor
from onelora_compile.exporters.onnx_file.save import save_model
from onelora_compile.exporters.onnx_runtime.declared import fitted, slots_of_model
from onelora_compile.exporters.onnx_runtime.measuring import measuring_session
from onelora_compile.exporters.opsets.one_node import constant_of

if TYPE_CHECKING:
    import onnx_ir

LARGEST = 65504.0  # of float16
INFINITE = 65520.0  # what rounds to infinity in float16: a mask of -65504 with a score added does not reach it
NORMAL = 2.0**-14  # below it float16 loses bits
ZERO = 2.0**-25  # what rounds to zero in float16
STORED = "initializer"
INPUT = "input"
_SMALL = 1 << 20  # bytes of an external weight
_AT_ONCE = 256  # values that are outputs of one run


@dataclasses.dataclass(frozen=True)
class TensorRange:
    """What one value was on the inputs.

    Attributes:
        name: of the value in the file.
        op: the operator that makes it; "initializer" and "input" for what none makes.
        dtype: that it has in the file.
        largest: magnitude of its finite numbers.
        beyond: share of its finite numbers that float16 can't hold.
        vanished: share of its numbers other than zero that are zero in float16.
        subnormal: the same of those that lose bits, below 2**-14.
        finite: whether all of it is finite in float32.
        nan: whether any of it is NaN there: of constants that are infinite in the file since they were rounded.
        constant: whether all its numbers are equal.
    """

    name: str
    op: str
    dtype: str
    largest: float
    beyond: float
    vanished: float
    subnormal: float
    finite: bool
    nan: bool
    constant: bool

    @property
    def headroom(self) -> float:
        """How many times larger it could be in float16."""
        return LARGEST / self.largest if self.largest else float("inf")

    @property
    def overflows(self) -> bool:
        """Whether float16 rounds it to infinity."""
        return self.largest >= INFINITE

    @property
    def underflows(self) -> bool:
        """Whether even its largest number loses bits in float16."""
        return 0 < self.largest < NORMAL

    @property
    def lost(self) -> bool:
        """Whether it is a constant that float16 makes zero, as the number that keeps a norm from dividing by zero."""
        return self.op == STORED and 0 < self.largest <= ZERO

    @property
    def broken(self) -> bool:
        """Whether the file has float16 here, and it overflows, or is NaN for what was rounded before."""
        return (self.overflows or self.nan) and self.dtype == "float16"

    @property
    def told(self) -> str:
        """The value, for people."""
        return f"{self.name!r} ({self.op}), " + (
            "NaN: a constant before it is infinite in the file" if self.nan else f"up to {self.largest:.3g}"
        )


def measure(
    model: onnx_ir.Model, runs: Iterable[Mapping[str, np.ndarray]], replaced: Collection[str] = ()
) -> dict[str, TensorRange]:
    """The range of every floating value of the main graph, in the order of the graph; constants first.

    Args:
        model: not changed.
        runs: the inputs of each run, and values for `replaced`.
        replaced: initializers that the runs give.

    Raises:
        ConfigError: no runs, or inputs that the model can't be run on.
        ExportError: ONNX Runtime can't load the model.
    """
    typed = _typed(model)
    twin = _in_float32(typed)
    watched = _watched(typed)
    seen = {name: _Seen() for name in watched}
    kinds = {value.name: value for value in twin.graph.inputs}
    made = {value.name: value for node in twin.graph for value in node.outputs}
    for name in watched:
        if name in made and not made[name].is_graph_output():
            twin.graph.outputs.append(made[name])
    for name in replaced:
        if name not in kinds:
            twin.graph.inputs.append(twin.graph.initializers[name])
    for value, tensor in _stored(typed):
        if value.name not in replaced:
            seen.setdefault(str(value.name), _Seen()).look(read_tensor(tensor))
    count = 0
    with tempfile.TemporaryDirectory(prefix="onelora-") as folder:
        save_model(twin, Path(folder) / "twin.onnx", _loaded(twin) or None)
        session = measuring_session(Path(folder) / "twin.onnx", "in float32, to measure its ranges")
        slots = slots_of_model(twin)
        for given in runs:
            feed = fitted(given, slots)
            _refuse_nan(feed)
            _run(session, [name for name in watched if name in made], feed, seen)
            for name in watched:
                if name in feed:
                    seen[name].look(np.asarray(feed[name]))
            count += 1
    if not count:
        raise ConfigError("there are no inputs to measure ranges on")
    ops = watched | {str(value.name): STORED for value, _ in _stored(typed)}
    dtypes = _dtypes(typed)
    order = sorted(ops, key=lambda name: ops[name] != STORED)
    return {name: seen[name].result(name, ops[name], dtypes[name]) for name in order if name in seen}


@dataclasses.dataclass
class _Seen:
    """What was seen of one value so far."""

    largest: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    numbers: int = 0  # other than zero, and finite
    beyond: int = 0
    vanished: int = 0
    subnormal: int = 0
    finite: bool = True
    nan: bool = False

    def look(self, values: np.ndarray) -> None:
        """Take the numbers of one run in."""
        sizes = np.abs(values.astype(np.float32, copy=False)).ravel()
        held = sizes[np.isfinite(sizes)]
        self.finite &= held.size == sizes.size
        self.nan |= not self.finite and bool(np.isnan(sizes).any())
        self.count += held.size
        if not held.size:
            return
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.largest = max(self.largest, float(held.max()))
        self.numbers += int(np.count_nonzero(held))
        self.beyond += int((held >= INFINITE).sum())
        self.vanished += int(((held > 0) & (held <= ZERO)).sum())
        self.subnormal += int(((held > 0) & (held < NORMAL)).sum())

    def result(self, name: str, op: str, dtype: str) -> TensorRange:
        """The range."""
        numbers, count = max(1, self.numbers), max(1, self.count)
        return TensorRange(
            name,
            op,
            dtype,
            self.largest,
            self.beyond / count,
            self.vanished / numbers,
            self.subnormal / numbers,
            self.finite,
            self.nan,
            self.low == self.high and self.count > 1,
        )


def _typed(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy without functions, whose values have dtypes where these can be known."""
    passes = require("onnx_ir.passes.common", "onnx", "measure ranges")
    copy = model.clone()
    if copy.functions:
        passes.InlinePass()(copy)
    passes.ShapeInferencePass()(copy)
    return copy


def _in_float32(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy that computes in float32; what is in bodies stays."""
    ir: Any = require("onnx_ir", "onnx", "measure ranges")
    twin = model.clone()
    nodes = [node for node in twin.graph if not _has_body(node)]
    retype(twin, {node: ir.DataType.FLOAT for node in nodes if _is_half(node)})
    twin.ir_version = max(twin.ir_version, 4)
    return twin


def _loaded(twin: onnx_ir.Model) -> bool:
    """Read small external weights, whose file is elsewhere; returns whether there are large ones."""
    ir: Any = require("onnx_ir", "onnx", "measure ranges")
    external = False
    for value in twin.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and hasattr(tensor, "location"):
            if tensor.nbytes > _SMALL:
                external = True
            else:
                value.const_value = ir.tensor(read_tensor(tensor), name=value.name)
    return external


def _has_body(node: onnx_ir.Node) -> bool:
    return any(one.type.name in ("GRAPH", "GRAPHS") for one in node.attributes.values())


def _is_half(node: onnx_ir.Node) -> bool:
    values = [*node.inputs, *node.outputs]
    return any(value is not None and value.dtype is not None and value.dtype.name in FLOATS[1:] for value in values)


def _watched(model: onnx_ir.Model) -> dict[str, str]:
    """The floating values that are computed or fed, with the operator that makes each."""
    found = {str(one.name): INPUT for one in model.graph.inputs if _floating(one) and one.const_value is None}
    for node in model.graph:
        if node.op_type != "Constant":
            found |= {str(one.name): node.op_type for one in node.outputs if one.name and _floating(one)}
    return found


def _floating(value: onnx_ir.Value) -> bool:
    return value.dtype is not None and value.dtype.name in FLOATS


def _stored(model: onnx_ir.Model) -> list[tuple[onnx_ir.Value, Any]]:
    """Numbers that the file has: in initializers, and in nodes, which are run but not watched."""
    held = [(value, value.const_value) for value in model.graph.initializers.values()]
    nodes = [node.outputs[0] for node in model.graph if node.op_type == "Constant"]
    held += [(value, constant_of(value)) for value in nodes]
    return [(value, tensor) for value, tensor in held if tensor is not None and tensor.dtype.name in FLOATS]


def _dtypes(model: onnx_ir.Model) -> dict[str, str]:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    named = {str(value.name): value.dtype for value in values if _floating(value)}
    named |= {str(value.name): tensor.dtype for value, tensor in _stored(model)}
    return {name: "float32" if one.name == "FLOAT" else one.name.lower() for name, one in named.items() if one}


def _refuse_nan(feed: Mapping[str, np.ndarray]) -> None:
    """Refuse an input that tells nothing: everything behind NaN is NaN, and no number would be too large."""
    for name, given in feed.items():
        if (value := np.asarray(given)).dtype.kind == "f" and np.isnan(value).any():
            raise ConfigError(f"an input to measure ranges on has NaN in {name!r}: give inputs of the model's kind")


def _run(session: Any, names: list[str], feed: Mapping[str, np.ndarray], seen: Mapping[str, _Seen]) -> None:
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        try:
            found = session.run(part, dict(feed))
        except Exception as error:
            raise ConfigError(f"ONNX Runtime can't run an input to measure ranges on: {error}") from error
        for name, values in zip(part, found, strict=True):
            seen[name].look(np.asarray(values))
