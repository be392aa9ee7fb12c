"""Write this project's operators out in an exported program, so that a process without this package loads and runs it.

    feature_sum(x)               ->  sum.dim_IntList(x, [-1], keepdim, dtype=float32)
    add_rank1(y, s, b)           ->  addcmul(y, s, b), and a cast where that is wider than y
    rank1_update, adapted_weight ->  likewise: whatever ops.py computes, traced on the example values
    vector(p, "name")            ->  p

The given program is left as it is, and so is every other node of its graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from onelora_compile.dynamo.private_api import on_examples
from onelora_compile.errors import PassError
from onelora_compile.ops import VECTOR
from onelora_compile.passes.exported.changed_program import copied, rebuilt
from onelora_compile.passes.graph.emit import inline
from onelora_compile.passes.graph.subgraphs import scopes
from onelora_compile.passes.sites.linear_site import example

NAMESPACE = "onelora"


def open_operators(program: ExportedProgram) -> ExportedProgram:
    """A program of plain ATen operators that computes the same.

    Raises:
        PassError: an operator whose inputs have no example values.
    """
    gm = copied(program)
    for scope in scopes(gm):
        for node in list(scope.gm.graph.nodes):
            if getattr(node.target, "namespace", None) == NAMESPACE:
                _open(scope.gm.graph, node)
        scope.gm.recompile()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    return rebuilt(program, gm, specs, dict(program.state_dict))


def _open(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is VECTOR:
        node.replace_all_uses_with(node.all_input_nodes[0])
    else:
        node.replace_all_uses_with(_written(graph, node))
    graph.erase_node(node)


def _written(graph: fx.Graph, node: fx.Node) -> fx.Node:
    sources = list(node.all_input_nodes)
    examples = [example(source) for source in sources]
    if any(one is None for one in examples):
        raise PassError(f"{node.name}: the program carries no example values, so it can't be written out in ATen")

    def compute(*tensors: Tensor) -> Any:
        values = dict(zip(sources, tensors, strict=True))
        arguments: Any = fx.map_arg(node.args, values.__getitem__)
        return node.target(*arguments)  # type: ignore[operator]

    with torch.no_grad(), on_examples(examples):
        traced = make_fx(compute)(*examples)  # below autograd, where a composite is what it is made of
    new: fx.Node = inline(graph, node, traced, sources)
    return new
