"""Which weights followed code reads, with their input axes, or why these are not known."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from torch import Tensor, fx, nn

from onelora_compile.kinds import is_plain
from onelora_compile.passes.graph.writes import written
from onelora_compile.passes.sites.contractions import CONTRACTIONS
from onelora_compile.passes.sites.linear_site import match_linear
from onelora_compile.passes.sites.operators import op_name
from onelora_compile.passes.sites.other_uses import ASK, made_of_parameters, other_uses, users
from onelora_compile.passes.sites.weight_path import input_axes, weight_chains
from onelora_compile.weight_uses.follow_forward import Followed
from onelora_compile.weight_uses.replaced_functions import output_of_a_script, part_of_a_value
from onelora_compile.weight_uses.tracer import PAST_MARK

BOTH_WAYS = "its weight is used as W and as its transpose: one vector can't be both"
INSIDE = "used in the forward of a linear that is adapted by its own weight or output"
MIXED = "used as a view that mixes its axes, so which of them are inputs can't be told" + ASK
PAST = "taken out of a dictionary or a list of parameters, where it can't be handed out adapted"
WRITTEN = "written to by the forward, which would write to a copy of it"
REPLACED = "its module is called with another weight in its place (torch.func.functional_call, or an assignment)"
KEPT = (BOTH_WAYS, PAST, WRITTEN, REPLACED)  # reasons that no other use of the weight takes away
READ = "read besides by an op that is no linear one"
GIVEN = "given to a function of torch.jit.script, which nothing can follow" + ASK
SCRIPTED = "in a module of torch.jit.script, whose code nothing can be added to"
NOT_TOLD = "whether it is the weight of a linear op can't be told"  # by adapt; a captured graph can
NOT_FOLLOWED = (
    f"the forward of {{kind}} can't be followed without values ({{error}}), so {NOT_TOLD}: name it, with its input "
    "axis, in target_parameters if it is"
)


@dataclasses.dataclass(frozen=True)
class DirectRead:
    """A weight that is read where it is used.

    Attributes:
        module: the module that holds it.
        parameter: its name there.
        dims: its input axes; None where they are not known.
        convolution: whether it is used by a convolution.
        why: why they are not known.
        own: whether the forward of that module reads it.
    """

    module: nn.Module
    parameter: str
    dims: tuple[int, ...] | None
    convolution: bool = False
    why: str = ""
    own: bool = True


def reads_of(way: Followed) -> Iterator[DirectRead]:
    """The weights of one graph."""
    yield from (DirectRead(module, name, None, why=REPLACED) for module, name in way.replaced)
    for site in match_linear(way.gm):
        if site.chain is None or (held := _parameter(way, site.chain.root)) is None:
            continue
        past = PAST_MARK in site.chain.root.meta
        dims = None if past else input_axes(site.chain, held[2].shape, site.axes)
        yield DirectRead(*held[:2], dims, site.kind == "conv", PAST if past else MIXED if dims is None else "")
    for use in other_uses(way.gm):
        if (held := _parameter(way, use.root)) is not None:
            yield DirectRead(*held[:2], None, why=PAST if PAST_MARK in use.root.meta else use.reason)
    alone, chains = made_of_parameters(way.gm), weight_chains(way.gm)
    for node, root in users(way.gm):
        if (held := _parameter(way, root)) is None:
            continue
        past = PAST_MARK in root.meta
        into = chains.get(into) if (into := written(way.gm, node)) is not None else None
        if into is not None and into.root is root and not past:
            yield DirectRead(*held[:2], None, why=WRITTEN)
        elif op_name(node).removesuffix("_") not in CONTRACTIONS:
            if past and all(one in alone for one in node.all_input_nodes) and not _is_weight_of(node, alone):
                continue  # a penalty on all parameters is one on the base's
            yield DirectRead(
                *held[:2], None, why=PAST if past else GIVEN if node.target is output_of_a_script else READ
            )


def _is_weight_of(node: fx.Node, alone: Collection[fx.Node]) -> bool:
    """Whether what is computed from parameters alone comes to a linear op, or to `vmap`."""
    seen, left = set(), [node]
    while left:
        if (one := left.pop()) in alone and one not in seen:
            seen.add(one)
            left += one.users
        elif one not in seen and (op_name(one) in CONTRACTIONS or one.target is part_of_a_value):
            return True
    return False


def _parameter(way: Followed, root: fx.Node) -> tuple[nn.Module, str, Tensor] | None:
    """The module that holds a parameter of the graph, its name there, and it; None for what can't be a weight."""
    held = way.held.get(str(root.target))
    weight = held[0]._parameters[held[1]] if held is not None else None
    if held is None or weight is None or not is_plain(weight) or weight.ndim < 2:
        return None
    return *held, weight
