"""Which reads of an ONNX model's constants can be those of a parameter: by its numbers, or by its shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from onelora_compile.exporters.fold.find_weights import WeightUse, constants_of, uses_of
from onelora_compile.exporters.fold.layout import lies_turned
from onelora_compile.exporters.onnx_file.load import as_torch, read_tensor
from onelora_compile.weights.fingerprint import Fingerprint, fingerprint_of_values

if TYPE_CHECKING:
    import onnx_ir

# Which input of an op is which parameter of its module; other ops have no fixed places.
_NORMS = ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization")
SLOTTED = ("Gemm", "Conv", "ConvTranspose", "RMSNormalization", *_NORMS)
SLOTS = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
OPTIONAL_BIAS = ("Gemm", "Conv", "ConvTranspose", "LayerNormalization")  # ops whose bias may be left out
# What reads a parameter that is known by its shape alone.
_PARAMETER_OPS = (*SLOTTED, "MatMul", "Gather", "Mul", "Add")


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterRead:
    """One way from a constant to the op that reads it.

    Attributes:
        value: the constant.
        use: the way.
        transposed: whether the constant is the parameter transposed.
    """

    value: onnx_ir.Value
    use: WeightUse
    transposed: bool


class ParameterReads:
    """The constants of a model that are as large as one of some parameters, and what reads them."""

    def __init__(self, model: onnx_ir.Model, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        sizes = {value.numel() for value in parameters.values()}
        self.reads = [
            (value, tuple(uses_of(value)))
            for value in constants_of(model)
            if value.const_value is not None
            and value.const_value.size in sizes
            and value.const_value.dtype.is_floating_point()
        ]

    def by_numbers(self, name: str, base: Fingerprint | None) -> list[ParameterRead]:
        """Every read of a constant that has the base's numbers."""
        found: list[ParameterRead] = []
        if base is None:
            return found
        for value, uses in self.reads:
            fitting = [turn for turn in self._layouts(name, value) if _agrees(self._numbers(value, name, turn), base)]
            if fitting:
                found += _reads(name, value, uses, fitting)
        return found

    def by_shape(self, name: str) -> list[ParameterRead]:
        """Every read of a constant that can hold the parameter; a square one lies as the op needs it."""
        found: list[ParameterRead] = []
        for value, uses in self.reads:
            if layouts := self._layouts(name, value):
                found += _reads(name, value, [use for use in uses if use.op.op_type in _PARAMETER_OPS], layouts)
        return found

    def fingerprint(self, name: str, read: ParameterRead) -> Fingerprint:
        """Of the constant that a read is of, laid out as the parameter."""
        return fingerprint_of_values(self._numbers(read.value, name, read.transposed))

    def _layouts(self, name: str, value: onnx_ir.Value) -> list[bool]:
        """How a constant can hold the parameter: as it is (False), transposed (True), or either."""
        assert value.const_value is not None
        own = [size for size in self.parameters[name].shape if size != 1]
        held = [size for size in value.const_value.shape.numpy() if size != 1]
        turns = (False, True) if len(own) == 2 else (False,)
        return [turn for turn in turns if held == (own[::-1] if turn else own)]

    def _numbers(self, value: onnx_ir.Value, name: str, transposed: bool) -> Tensor:
        numbers, shape = as_torch(read_tensor(value.const_value)), self.parameters[name].shape
        return numbers.reshape(shape[::-1]).T if transposed else numbers.reshape(shape)


def uniform(value: onnx_ir.Value) -> bool:
    """Whether a constant is one number everywhere, as new norms and biases are: others have it by chance."""
    numbers = read_tensor(value.const_value)
    return bool((numbers == numbers.flat[0]).all())


def _reads(
    name: str, value: onnx_ir.Value, uses: Sequence[WeightUse], layouts: Sequence[bool]
) -> Iterator[ParameterRead]:
    """The uses at a place that can be the parameter's; a square one, if both layouts fit, lies as the op needs it."""
    for use in uses:
        turned = lies_turned([use]) if len(layouts) > 1 else layouts[0]
        # A table of an embedding or of positions lies as its module has it; a factor tells nothing of what is behind.
        if _role_fits(name, use) and not (turned is None and use.op.op_type == "Mul"):
            yield ParameterRead(value, use, bool(turned))


def _role_fits(name: str, use: WeightUse) -> bool:
    """Whether an op whose inputs have fixed places reads the parameter at its own."""
    own = name.rpartition(".")[2]
    return use.op.op_type not in SLOTTED or own not in SLOTS or use.position == SLOTS[own]


def _agrees(numbers: Tensor, base: Fingerprint) -> bool:
    """Whether a constant is a base value; small values can have one sketch by chance, so the norm counts too."""
    here = fingerprint_of_values(numbers)
    near = abs(here.norm - base.norm) <= 0.01 * max(here.norm, base.norm)
    return here.shape == base.shape and near and here.agrees(base)


@dataclasses.dataclass
class TrainedPlaces:
    """Where trained tensors go.

    Attributes:
        reads: of each that was found.
        dropped: of a bias that the model lacks, since it was zero: the reads of its weight that it belongs behind, and
            the shape that it has there.
        missing: those without a place, with the reason.
    """

    reads: dict[str, list[ParameterRead]] = dataclasses.field(default_factory=dict)
    dropped: dict[str, list[tuple[ParameterRead, tuple[int, ...]]]] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
