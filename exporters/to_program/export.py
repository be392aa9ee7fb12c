"""Export a model with its adapter to a program of torch.export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from onelora_compile.adapting.weight_target import vector_of
from onelora_compile.errors import one_of
from onelora_compile.exporters.calls.axes import axes_of
from onelora_compile.exporters.calls.compare import Parity
from onelora_compile.exporters.calls.signature import Call, identifiers
from onelora_compile.exporters.jetson.device.core.modes import FOLD, MODES
from onelora_compile.exporters.to_program.check import Feed, check_program
from onelora_compile.exporters.to_program.runtimes import called
from onelora_compile.exporters.to_program.source import Source, exportable
from onelora_compile.passes.exported.changed_program import remade
from onelora_compile.passes.exported.fold_vectors import FoldResult
from onelora_compile.passes.exported.open_operators import open_operators
from onelora_compile.passes.exported.vectors_to_inputs import vectors_to_inputs

PROGRAM_MODES = ("fold", "input")  # what `export_program(adapters=)` takes


@dataclasses.dataclass(frozen=True)
class Exported:
    """A program, and what is known of it.

    Attributes:
        program: as `export_program` returns it.
        source: what it was exported from.
        call: the example call of the model.
        inputs: the program's input for each name of an adapter, in order.
        folded: what became of the vectors.
        outputs: names of the tensors that it returns.
        captured_for: what the sizes must be for it to be right.
    """

    program: ExportedProgram
    source: Source
    call: Call
    inputs: dict[str, str]
    folded: FoldResult
    outputs: list[str]
    captured_for: list[str]

    def check(self, feed: Feed, what: str) -> Parity:
        """Compare what computes the program with the model in eager; see `check_program`."""
        return check_program(feed, what, self.source, self.call, self.inputs, self.outputs)


def export_program(
    model: nn.Module,
    args: Sequence[Any] | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    adapters: str = "fold",
    dynamic_shapes: Any = None,
    verify: bool = True,
) -> ExportedProgram:
    """Export a model, adapted or not, to a program of plain ATen operators, for any runtime that reads one.

    The program needs this package neither to be loaded (`torch.export.load`) nor to run, and transformers as little.
    Tensors of `args` are its positional inputs; those of `kwargs` and the vectors are keyword inputs. What is inside a
    container is an input of its own (`past_key_values_0_key`); other arguments are constants. It returns a tensor or a
    tuple of them as the model does; a mapping, a dataclass or a cache becomes a dictionary by name.

    The model is exported in evaluation mode and is not changed; weights that nothing is folded into are shared with it.

    Args:
        model: the model, compiled or not.
        args: example inputs, in the dtypes and on the device of the model.
        kwargs: example keyword inputs.
        adapters: where the vectors are.
            "fold": inside the weights; the graph is the base's, node for node.
            "input": keyword inputs after the model's own, in the order of `onelora.vectors(model)`, then heads and
            norms that are trained besides. Each is called by its name in the adapter's file, with `_` for what no
            argument's name may hold (`layer.0.query` is `layer_0_query`, `0` is `_0`). For a vector zeros are the
            base, for a head or a norm the base's own values. They have the dtype of the model's.
        dynamic_shapes: as in `export_onnx`: as in `torch.export.export`, and a dimension may be a name.
        verify: run the program on the example inputs, compare with eager, and fail beyond the dtype's tolerance; with
            "input" once more with other vectors.

    Raises:
        ExportError: the model can't be exported, or the program differs from it.
        ConfigError: an unknown value of `adapters`, an axis that no input has.
        StateError: "input" of a model that is not adapted; a `disabled` block is open.
        PassError: a vector that can't be folded, or can't be an input.
        MergeError: a weight that can't take its vector.
    """
    exported = program_of(model, args, kwargs, adapters, dynamic_shapes)
    if verify:
        exported.check(called(exported.program.module()), "exported program")
    return exported.program


def program_of(
    model: nn.Module, args: Sequence[Any] | Tensor, kwargs: Mapping[str, Any] | None, adapters: str, dynamic_shapes: Any
) -> Exported:
    """`export_program` without the comparison, with all that is known."""
    one_of("adapters", adapters, PROGRAM_MODES)
    mode = MODES[adapters]
    root = exportable(model, mode)
    source = Source.of(root, mode)
    call = Call.of(root, args, kwargs)
    call.check()
    axes = axes_of(dynamic_shapes, root, call)
    frozen = source.captured(call, axes, "folded" if mode is FOLD else "activation")
    own = identifiers(call.tensors)
    names = list(source.values) if mode is not FOLD else []
    inputs = dict(zip(names, identifiers(names, own), strict=True))
    targets = {inputs[name]: target for name, target in _targets(source, frozen.program, names).items()}
    vectors = {name: frozen.program.state_dict[target].detach() for name, target in targets.items()}
    program = open_operators(vectors_to_inputs(frozen.program, targets)) if targets else frozen.program
    program = _called(program, call, own, vectors, frozen.result)
    return Exported(program, source, call, inputs, source.named(frozen.folded), frozen.outputs, frozen.captured_for)


def _targets(source: Source, program: ExportedProgram, names: Sequence[str]) -> dict[str, str]:
    """For each name of an adapter, that of the parameter or buffer of the program that holds it."""
    found: dict[str, str] = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None and (name := source.replaced.get(spec.target) or vector_of(spec.target)) is not None:
            found.setdefault(name, spec.target)
    return {name: found[source.prefix + name] for name in names}


def _called(
    program: ExportedProgram,
    call: Call,
    names: Sequence[str],
    vectors: Mapping[str, Tensor],
    result: pytree.TreeSpec,
) -> ExportedProgram:
    """The program with the inputs of `args` by position, the others by name, and the model's own form of a result."""
    args, kwargs = call.by_name([tensor.detach() for tensor in call.tensors.values()])
    example = (args, kwargs | dict(vectors))
    first, *others = program.module_call_graph
    assert first.signature is not None
    signature = dataclasses.replace(
        first.signature,
        in_spec=pytree.tree_structure(example),
        out_spec=result,
        forward_arg_names=[*names, *vectors],
    )
    whole = [dataclasses.replace(first, signature=signature), *others]
    return remade(program, module_call_graph=whole, example_inputs=example)
