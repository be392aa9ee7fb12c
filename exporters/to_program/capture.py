"""From a model to an exported program with its vectors where they are wanted: what every exporter starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from onelora_compile.adapting.dispatched import is_offloaded
from onelora_compile.errors import ExportError
from onelora_compile.exporters.calls.axes import Axes, MayVary, for_export
from onelora_compile.exporters.calls.evaluating import evaluating
from onelora_compile.exporters.calls.signature import Call, flat_forward, outputs_of, plain
from onelora_compile.passes.exported.carry_vectors import carry_vectors
from onelora_compile.passes.exported.fold_vectors import FoldResult, fold_vectors

NO_BOUND = 2**62  # infinity is above
VectorPlace = Literal["folded", "weight", "activation"]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A captured program.

    Attributes:
        program: takes the tensors of a call and returns those of its result, both flat.
        folded: what became of the vectors.
        outputs: names of what it returns.
        result: how these stand in the model's own result, in PyTorch's containers (`plain`).
        axes: those dynamic axes of each input that vary; the model may have fixed others.
        captured_for: what the sizes must be for the program to be right.
    """

    program: ExportedProgram
    folded: FoldResult
    outputs: list[str]
    result: pytree.TreeSpec
    axes: list[Axes]
    captured_for: list[str]


def freeze(
    model: nn.Module,
    call: Call,
    axes: Sequence[Axes],
    place: VectorPlace = "folded",
    originals: Mapping[str, Tensor] | None = None,
    trained: Mapping[str, str] | None = None,
    stored: torch.dtype | None = None,
) -> Frozen:
    """Export a plain model in evaluation mode and bring its vectors to their place; the model is not changed.

    Args:
        model: adapted or not.
        call: example inputs.
        axes: dynamic axes of each tensor of the call.
        place: of the vectors: "folded" into the weights, beside each "weight" as `adapted_weight`, or beside each
            "activation" as `add_rank1` of feature sums, one for each input.
        originals: as in `fold_vectors`.
        trained: as in `carry_vectors`, where vectors are carried.
        stored: as in `fold_vectors`.
    """
    if (name := next((n for n, m in model.named_modules() if is_offloaded(m)), None)) is not None:
        raise ExportError(
            f"can't export: accelerate has offloaded the weights of {name!r}: load the base without offloading, load "
            "the adapter, and export that"
        )
    names: list[str] = []
    results: list[pytree.TreeSpec] = []

    def note(result: Any) -> None:
        names[:] = outputs_of(result)
        results[:] = [pytree.tree_structure(plain(result))]

    def exported(axes: Sequence[Axes]) -> ExportedProgram:
        with evaluating(model), _any_size(call, axes):
            flat = flat_forward(model, call, note)
            # Other objects: torch.export marks axes as dynamic on them, and leaves the marks when it fails.
            inputs = tuple(tensor.detach() for tensor in call.tensors.values())
            program = torch.export.export(flat, inputs, dynamic_shapes=for_export(axes), strict=False)
            return _by_first_names(program, flat)

    program = exported(axes)
    vary = _varying(program, call, axes)
    if vary != list(axes):
        program = exported(vary)  # with numbers for what is fixed
    sizes = captured_for(program, call, vary)
    if place == "folded":
        placed, done = fold_vectors(program, originals=originals, stored=stored)
    else:
        placed, done = carry_vectors(program, place, trained)
    return Frozen(placed, done, names, results[0], vary, sizes)


def _by_first_names(program: ExportedProgram, module: nn.Module) -> ExportedProgram:
    """One input for what a module holds under several names, called by the first of them, as adapters call it.

    torch.export makes an input for each name, and uses any one of them.
    """
    first: dict[int, str] = {}
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    names = {name: first.setdefault(id(value), name) for name, value in held}
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    kept: dict[str, fx.Node] = {}
    for spec in list(program.graph_signature.input_specs):
        name, node = names.get(spec.target or ""), nodes[spec.arg.name]
        if name in kept:
            node.replace_all_uses_with(kept[name])
            program.graph.erase_node(node)
            program.graph_signature.input_specs.remove(spec)
        elif name is not None:
            kept[name] = node
            spec.target = name
    program.graph_module.recompile()
    return program


def _varying(program: ExportedProgram, call: Call, axes: Sequence[Axes]) -> list[Axes]:
    """The axes without those that the program has one size for, which torch.export says of a size above 1 alone.

    Raises:
        ExportError: one of these was to vary.
    """
    found = []
    for name, value, each in zip(call.tensors, _inputs_of(program), axes, strict=True):
        fixed = {axis: dim for axis, dim in each.items() if _is_fixed(program, value.shape[axis])}
        if asked := [axis for axis, dim in fixed.items() if isinstance(dim, str) and not isinstance(dim, MayVary)]:
            raise ExportError(
                f"the model fixes axis {asked[0]} ({each[asked[0]]!r}) of {name!r} at the example's size, "
                f"{call.tensors[name].shape[asked[0]]}: leave it out of dynamic_shapes, or give another example"
            )
        found.append({axis: dim for axis, dim in each.items() if axis not in fixed})
    return found


def _inputs_of(program: ExportedProgram) -> list[Tensor]:
    """The inputs as they were captured, with symbols for the sizes that vary."""
    inputs = set(program.graph_signature.user_inputs)
    return [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in inputs]


def captured_for(program: ExportedProgram, call: Call, axes: Sequence[Axes]) -> list[str]:
    """What the sizes must be for a program to be right, beside 2 or more: `batch <= 3`, `batch % 2 == 0`.

    torch.export follows that branch of the model's Python which the example takes (`if x.shape[0] < 4`), and keeps the
    condition; a file does not. Conditions on sums and products of sizes are left out: views and layouts bring many.

    Args:
        program: captured with these axes.
        call: whose inputs they are.
        axes: dynamic axes of each of them.
    """
    symbols: dict[sympy.Expr, sympy.Symbol] = {}
    guards: dict[sympy.Expr, None] = {}
    for name, value, each in zip(call.tensors, _inputs_of(program), axes, strict=True):
        for axis, dim in each.items():
            size: Any = value.shape[axis]
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbols.setdefault(
                    size.node.expr, sympy.Symbol(dim if isinstance(dim, str) else f"{name}.shape[{axis}]")
                )
                guards |= dict.fromkeys(guard.expr for guard in size.node.shape_env.guards)
    bounds = [_bounds(program, symbol) for symbol in symbols]
    found = [*itertools.chain(*bounds), *(guard for guard in guards if _is_plain(guard, symbols))]
    return list(dict.fromkeys(PythonPrinter().doprint(one.xreplace(symbols)) for one in found))


def _bounds(program: ExportedProgram, symbol: sympy.Expr) -> list[sympy.Expr]:
    """The range of a size, of which every one of torch.export begins at 2."""
    span = program.range_constraints.get(symbol)
    if span is None:
        return []
    low = [sympy.Ge(symbol, span.lower, evaluate=False)] if span.lower > 2 else []
    return [*low, *([sympy.Le(symbol, span.upper, evaluate=False)] if span.upper < NO_BOUND else [])]


def _is_plain(guard: sympy.Expr, symbols: Collection[sympy.Expr]) -> bool:
    """Whether a condition compares a size with another one, or is one on a size that no range says."""
    sides = [side.args[0] if type(side).__name__.endswith("Mod") else side for side in guard.args]
    if not guard.is_Relational or any(side not in symbols and not side.is_Integer for side in sides):
        return False
    return isinstance(guard, (sympy.Eq, sympy.Ne)) or all(side in symbols for side in guard.args)


def _is_fixed(program: ExportedProgram, size: int | torch.SymInt) -> bool:
    """Whether a size is one number; with `backed_size_oblivious`, a size that has to be 1 has the range 1 to 2."""
    if is_concrete_int(size):
        return True
    assert isinstance(size, torch.SymInt)
    bounds = program.range_constraints.get(size.node.expr)
    return bounds is not None and bool(bounds.upper <= 2)


def _any_size(call: Call, axes: Sequence[Axes]) -> contextlib.AbstractContextManager[Any]:
    """Let an axis vary whose example has size 1, which torch.export would take for a constant.

    Source: torch/fx/experimental/_config.py, `backed_size_oblivious` (torch 2.11 to 2.13).
    """
    sizes = [tensor.shape[axis] for tensor, each in zip(call.tensors.values(), axes, strict=True) for axis in each]
    if all(size > 1 for size in sizes):
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[Any] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched
