"""An exported program with another graph; the given one is left as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputSpec, TensorArgument


def rebuilt(
    program: ExportedProgram, gm: fx.GraphModule, specs: Mapping[str, InputSpec], state: dict[str, Tensor]
) -> ExportedProgram:
    """The program with another graph of the same outputs, given the specs of its inputs by the names of their nodes."""
    inputs = [specs[node.name] for node in gm.graph.find_nodes(op="placeholder")]
    values: Any = gm.graph.output_node().args[0]
    outputs = [
        dataclasses.replace(spec, arg=TensorArgument(node.name)) if isinstance(spec.arg, TensorArgument) else spec
        for spec, node in zip(program.graph_signature.output_specs, values, strict=True)
    ]
    signature = ExportGraphSignature(inputs, outputs)
    return remade(program, root=gm, graph=gm.graph, graph_signature=signature, state_dict=state)


def remade(program: ExportedProgram, **changes: Any) -> ExportedProgram:
    """The program with some of its parts changed, by the names that `ExportedProgram` takes them by."""
    parts = {
        "root": program.graph_module,
        "graph": program.graph,
        "graph_signature": program.graph_signature,
        "state_dict": program.state_dict,
        "range_constraints": program.range_constraints,
        "module_call_graph": program.module_call_graph,
        "example_inputs": program.example_inputs,
        "constants": program.constants,
        "verifiers": program.verifiers,
    }
    return ExportedProgram(**(parts | changes))


def copied(program: ExportedProgram) -> fx.GraphModule:
    """The graph of a program, subgraphs included, free to be changed."""
    gm = fx.GraphModule(program.graph_module, _copy(program.graph_module.graph))
    _copy_subgraphs(gm)
    return gm


def _copy(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    output = new.graph_copy(graph, nodes, return_output_node=True)
    assert isinstance(output, tuple)
    value, old = output
    new.output(value).meta = dict(old.meta)
    new.set_codegen(graph._codegen)
    for before, after in nodes.items():
        after.name = before.name  # the signature knows nodes by name; a copy renames 'input' and other builtins
    return new


def _copy_subgraphs(gm: fx.GraphModule) -> None:
    """Graphs of higher-order ops are shared with the given program until here."""
    for node in gm.graph.find_nodes(op="get_attr"):
        inner = getattr(gm, str(node.target), None)
        if isinstance(inner, fx.GraphModule):
            own = fx.GraphModule(inner, _copy(inner.graph))
            own.meta = copy.copy(inner.meta)
            setattr(gm, str(node.target), own)
            _copy_subgraphs(own)
