"""Whether an ONNX file computes what a model, or another file, computes."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from onelora_compile.adapting.adapter import unwrap
from onelora_compile.errors import ConfigError, ExportError, require
from onelora_compile.exporters.calls.compare import TOLERANCE, Parity, badness, compare_all
from onelora_compile.exporters.calls.evaluating import evaluating
from onelora_compile.exporters.calls.signature import Call, outputs_of
from onelora_compile.exporters.onnx_file.trained import Swapped
from onelora_compile.exporters.onnx_runtime.runner import OnnxRunner
from onelora_compile.kinds import as_args
from onelora_compile.printable import Printable, shortened
from onelora_compile.table import Table


@dataclasses.dataclass(frozen=True)
class Verification(Printable):
    """How a file differs from its reference; `print` shows a table.

    Attributes:
        parities: of each output.
        inputs: shape of each input that was fed.
    """

    parities: list[Parity]
    inputs: dict[str, tuple[int, ...]]

    @property
    def passed(self) -> bool:
        """Whether every output is within the tolerance of its dtype."""
        return all(parity.passed for parity in self.parities)

    def __rich__(self) -> Table:
        table = Table(title="inputs " + ", ".join(f"{name} {list(shape)}" for name, shape in self.inputs.items()))
        for column in ("output", "max difference", "relative", "allowed", ""):
            table.add_column(column)
        for one in self.parities:
            verdict = "FAILED" if not one.passed else "passed" if one.entries else "empty, nothing compared"
            table.add_row(one.output, f"{one.absolute:.1e}", f"{one.relative:.1e}", f"{one.tolerance:.0e}", verdict)
        return table


def verify(
    artifact: str | os.PathLike[str] | OnnxRunner,
    reference: str | os.PathLike[str] | OnnxRunner | nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    sizes: Mapping[str, int | Sequence[int]] | None = None,
    seed: int = 0,
) -> Verification:
    """Compare an ONNX model with another one, or with a model in eager, on the same inputs.

    Args:
        artifact: the file to check, or a runner of it with an adapter in use.
        reference: what is right: a file, a runner, or a module.
        inputs: arrays or tensors in the order of the artifact's inputs, or by name; None draws random ones: floats from
            a normal distribution, integers 0 and 1, so that they do as token ids and as masks.
        kwargs: what follows `inputs` in the artifact, by the names of the module's arguments.
        sizes: for random inputs: of dynamic dimensions by name, or the shape of an input by its name; dimensions that
            are not named have 4.
        seed: of random inputs.

    Raises:
        ConfigError: sizes of what the artifact does not have, or that do not fit it.
        ExportError: a file can't be run, the two have other inputs or outputs, or every output is empty.
    """
    runner = artifact if isinstance(artifact, OnnxRunner) else OnnxRunner(artifact)
    if inputs is None and kwargs is None:
        inputs = _random(runner, dict(sizes or {}), seed)
    names = runner.input_names
    call = None
    if isinstance(inputs, Mapping):
        given = dict(inputs)
    else:
        call = _call(reference, () if inputs is None else inputs, kwargs)
        given = _by_name(names, call)
    arrays = {name: _array(value) if isinstance(value, Tensor) else np.asarray(value) for name, value in given.items()}
    if isinstance(reference, nn.Module):
        expected = _eager_by_name(reference, arrays) if call is None else _eager(reference, call)
    else:
        other = reference if isinstance(reference, OnnxRunner) else OnnxRunner(reference)
        if len(other.input_names) != len(arrays):
            raise ExportError(f"{artifact} takes the inputs {names}, the reference {other.input_names}")
        # By position: tools rename inputs.
        expected = [torch.from_numpy(np.asarray(value)) for value in other.run([arrays[name] for name in names])]
    actual = [torch.from_numpy(np.asarray(value)) for value in runner.run(arrays)]
    shapes = {name: tuple(np.shape(value)) for name, value in arrays.items()}
    return Verification(compare_all(expected, actual, runner.output_names), shapes)


def _call(reference: Any, inputs: Sequence[Any] | Tensor, kwargs: Mapping[str, Any] | None) -> Call:
    """The inputs as a call of the reference; of a file's, which has no arguments, only their order counts."""
    model = unwrap(reference) if isinstance(reference, nn.Module) else nn.Identity()
    given = (as_args(inputs), dict(kwargs or {}))
    arrays = (np.ndarray, np.generic)
    return Call.of(model, *pytree.tree_map(lambda one: torch.as_tensor(one) if isinstance(one, arrays) else one, given))


def _by_name(names: Sequence[str], call: Call) -> dict[str, Tensor]:
    """What the file is fed: in order, and keyword arguments by name where it has their names."""
    if len(call.tensors) != len(names):
        raise ExportError(f"the ONNX model takes {len(names)} inputs {list(names)}; {len(call.tensors)} were given")
    count = call.positional
    keywords, rest = list(call.tensors)[count:], list(names)[count:]
    order = [*list(names)[:count], *(keywords if set(keywords) == set(rest) else rest)]
    return dict(zip(order, call.tensors.values(), strict=True))


def _eager(module: nn.Module, call: Call) -> list[Tensor]:
    args, kwargs = call.fresh()
    with evaluating(module):
        return _tensors(module(*args, **kwargs))


def _eager_by_name(module: nn.Module, arrays: Mapping[str, Any]) -> list[Tensor]:
    """Outputs of a module; inputs by name where its forward has those names, else in order."""
    tensors = {name: torch.as_tensor(np.array(value)) for name, value in arrays.items()}
    parameters = inspect.signature(module.forward).parameters
    if parts := [name for name in tensors if "." in name and name.partition(".")[0] in parameters]:
        raise ExportError(
            f"{parts[0]!r} is a part of an argument: give the arguments of {type(module).__name__} instead"
        )
    any_name = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    with evaluating(module):
        if any_name or set(parameters) >= set(tensors):
            return _tensors(module(**tensors))
        return _tensors(module(*tensors.values()))


def _random(runner: OnnxRunner, sizes: Mapping[str, int | Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    own = set(runner.input_names)
    nodes = [node for node in runner.session.get_inputs() if node.name in own]
    dims = {str(size) for node in nodes for size in node.shape if not isinstance(size, int)}
    if unknown := set(sizes) - dims - own:
        has = f"inputs {shortened(sorted(own))}, dynamic dimensions {shortened(sorted(dims))}"
        raise ConfigError(f"sizes of {shortened(sorted(unknown))}, which {runner.path} does not have; it has {has}")
    found = {}
    for node in nodes:
        shape = _shape(node.name, node.shape, sizes)
        kind = node.type.removeprefix("tensor(").removesuffix(")")
        if kind in ("float", "double", "float16"):
            dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[kind]
            found[node.name] = generator.normal(size=shape).astype(dtype)
        elif kind == "bool" or "int" in kind:
            found[node.name] = generator.integers(0, 2, shape).astype(kind)
        else:
            raise ExportError(f"input {node.name!r} is of {node.type}: give inputs, random ones are for numbers")
    return found


def _shape(name: str, dims: Sequence[int | str | None], sizes: Mapping[str, int | Sequence[int]]) -> list[int]:
    """The shape that an input is drawn in."""
    given = {key: [size] if isinstance(size, int) else list(size) for key, size in sizes.items()}
    if (shape := given.get(name)) is not None:
        if len(shape) != len(dims) or any(isinstance(d, int) and d != s for d, s in zip(dims, shape, strict=True)):
            raise ConfigError(f"sizes: {name!r} is {list(dims)} in the model, not {shape}")
        return shape
    if several := [str(dim) for dim in dims if len(given.get(str(dim), [0])) != 1]:
        raise ConfigError(f"sizes: {several[0]!r} is one dimension, not {given[several[0]]}")
    return [dim if isinstance(dim, int) else given.get(str(dim), [4])[0] for dim in dims]


def check_export(
    path: Path,
    model: nn.Module,
    call: Call,
    inputs: Sequence[Tensor],
    bank: Sequence[Mapping[str, np.ndarray]] = (),
    inside: torch.dtype | None = None,
) -> Parity:
    """Run an exported file in ONNX Runtime on the CPU and the model in eager on the same inputs, and compare.

    Vectors that can be swapped are compared with other values too: trained ones may be zero, and then a file that
    ignores them would pass.

    Args:
        path: the file.
        model: what it was exported from; not changed.
        call: inputs of the model.
        inputs: the same for the file, which may be of another dtype, in order.
        bank: the vectors of each adapter of a bank.
        inside: a narrower dtype that the file computes in, whose tolerance counts for floating outputs too.

    Returns:
        The parity of the worst output of the worst comparison.

    Raises:
        ExportError: the runtime refuses the file or its inputs, or it computes something else than the model.
        MissingExtraError: onnxruntime is not installed.
    """
    runner = OnnxRunner(path)
    given = [_array(value) for value in inputs]
    found = []
    for what, chosen, swapped in _scenarios(runner, model, bank):
        with evaluating(model):
            outputs = torch.func.functional_call(model, swapped, *call.fresh())
        actual = [torch.from_numpy(np.asarray(value)) for value in chosen.run(given)]
        compared = compare_all(_tensors(outputs), actual, runner.output_names)
        parity = max((_at_least(one, inside) for one in compared), key=badness)
        if not parity.passed:
            raise ExportError(
                f"the exported model differs from {type(model).__name__} {what}: output {parity.output!r} by "
                f"{parity.relative:.1e} relative ({parity.absolute:.1e} absolute), {parity.tolerance:.0e} is allowed; "
                f"nothing was written{_half_hint(parity, inputs)}"
            )
        found.append(parity)
    return max(found, key=badness)


def _at_least(parity: Parity, inside: torch.dtype | None) -> Parity:
    if inside is None or parity.tolerance not in TOLERANCE.values():  # of integers
        return parity
    return dataclasses.replace(parity, tolerance=max(parity.tolerance, TOLERANCE[inside]))


def _half_hint(parity: Parity, inputs: Sequence[Tensor]) -> str:
    half = any(value.dtype == torch.float16 for value in inputs) or parity.tolerance == TOLERANCE[torch.float16]
    lost = not math.isfinite(parity.relative) and half
    return ". float16 can't hold some of its values: keep_float32='auto' leaves these in float32" if lost else ""


def _scenarios(
    runner: OnnxRunner, model: nn.Module, bank: Sequence[Mapping[str, np.ndarray]]
) -> Iterator[tuple[str, OnnxRunner, dict[str, Tensor]]]:
    """What to compare: how to call it, the runner, and the parameters of the model for it."""
    swapped, metadata = Swapped(model), runner.metadata
    if metadata.traits.feeds_ids:
        for number, values in enumerate([{}, *bank], -1):
            yield f"with adapter {number}", runner.with_adapter(number), swapped.parameters(values)
        return
    yield "with its vectors", runner, {}
    if metadata.traits.takes_files:
        other = swapped.other_values(metadata.vectors, metadata.fingerprints)
        chosen = runner.with_vectors({name: other[name] for name in metadata.vectors})
        yield "with other vectors", chosen, swapped.parameters(other)


def _array(value: Tensor) -> Any:
    if value.dtype != torch.bfloat16:
        return value.detach().cpu().numpy()
    return require("onnxruntime", "onnx", "verify a bfloat16 model").OrtValue.ortvalue_from_numpy_with_onnx_type(
        value.detach().cpu().view(torch.int16).numpy(), 16
    )


def _tensors(outputs: Any) -> list[Tensor]:
    return list(outputs_of(outputs).values())
