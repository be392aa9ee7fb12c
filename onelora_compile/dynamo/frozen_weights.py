"""Weights that Inductor is asked to freeze, without those that an adapter changes.

With `torch._inductor.config.freezing` and without gradients Dynamo leaves parameters in the graph's module, and
Inductor makes constants of them: of the vectors too, and of what is trained besides, so that another adapter would
never be seen.  Those become inputs of the graph.  Source: torch/_dynamo/variables/builder.py, `is_parameter_freezing`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx


def lift(gm: fx.GraphModule, changing: Collection[int]) -> list[Tensor]:
    """Make inputs of tensors that a graph holds, behind its own; in place.

    Args:
        gm: with the tensors as attributes.
        changing: which, by identity.

    Returns:
        The tensors, in the order of the new inputs.
    """
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        if id(getattr(gm, str(node.target), None)) in changing:
            found.setdefault(str(node.target), []).append(node)
    sources: dict[str, Any] = getattr(gm, "_param_name_to_source", None) or {}
    values = []
    for name, nodes in found.items():
        inputs = gm.graph.find_nodes(op="placeholder")
        with gm.graph.inserting_after(inputs[-1]) if inputs else gm.graph.inserting_before():
            added = gm.graph.placeholder(name)
        added.meta = dict(nodes[0].meta)
        if name in sources:
            added._dynamo_source = sources.pop(name)
        for node in nodes:
            node.replace_all_uses_with(added)
            gm.graph.erase_node(node)
        values.append(getattr(gm, name))
        delattr(gm, name)
    if values:
        gm.recompile()
    return values
