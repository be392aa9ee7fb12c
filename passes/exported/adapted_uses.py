"""The adapted uses of weights in an exported program: whose weight, whose vector, and which node reads the weight."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from onelora_compile.adapting.weight_target import vector_of
from onelora_compile.errors import PassError
from onelora_compile.ops import ADAPTED_WEIGHT
from onelora_compile.passes.exported.update_source import addends, is_output_of
from onelora_compile.passes.graph.subgraphs import Scope
from onelora_compile.passes.sites.linear_site import LinearSite, match_linear, operands, rank1_updates
from onelora_compile.passes.sites.weight_path import input_axes

OUTPUT_ONLY = (
    "the module computes something else than W x + c (it scales, quantises or activates), so the vector, which adds to "
    "its output, can't go into its weight; export with adapters='input' or 'bank', leave it out with exclude_modules, "
    "or, if onelora.merge takes a copy of the model, export that"
)


@dataclasses.dataclass(frozen=True)
class AdaptedUse:
    """One adapted use of a weight: the node that says so, and the node that reads the weight."""

    scope: Scope
    update: fx.Node
    reader: fx.Node
    weight: fx.Node  # in the scope's own graph
    dims: tuple[int, ...]


class ProgramInputs:
    """What a program gives to the inputs of its graph.

    Attributes:
        specs: by the names of their nodes.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}

    def is_stored(self, node: fx.Node) -> bool:
        """Whether a node is a parameter or buffer of the program."""
        spec = self.specs.get(node.name)
        return spec is not None and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None

    def is_vector(self, node: fx.Node) -> bool:
        """Whether a node is a vector that adapting made."""
        if self.specs[node.name].kind is not InputKind.PARAMETER:
            return False
        return vector_of(self.target(node)) is not None

    def target(self, node: fx.Node) -> str:
        """The name of a parameter or buffer."""
        target = self.specs[node.name].target
        assert target is not None
        return target

    def module(self, vector: fx.Node) -> str:
        """The module that has a vector."""
        name = vector_of(self.target(vector))
        assert name is not None
        return name

    def name_of(self, update: fx.Node) -> str:
        """What a message calls an update: its module, or inside a higher-order op its node."""
        vector = operands(update)[2]
        return self.module(vector) if vector.name in self.specs else update.name


def adapted_uses(
    program: ExportedProgram, inputs: ProgramInputs, scope: Scope
) -> list[tuple[tuple[fx.Node, fx.Node], AdaptedUse]]:
    """The adapted uses of weights in one graph, by weight and vector as inputs of the outermost graph.

    Raises:
        PassError: an update whose linear, or whose weight, can't be found in the program.
    """
    uses = []
    for site in _sites(program, inputs, scope):
        if site.update is None:
            continue
        vector = scope.outer.get(operands(site.update)[2])
        root = site.chain.root if site.chain is not None else None
        if vector is None or root is None or site.chain is None or site.chain.adapted or root not in scope.outer:
            raise PassError(
                f"{inputs.name_of(site.update)!r}: its weight is computed in the graph ({site.weight}), so the "
                "vector can't be folded into it; remove the parametrization first, or merge before the export"
            )
        if not is_output_of(site):
            raise PassError(f"{inputs.name_of(site.update)!r}: {OUTPUT_ONLY}")
        weight = scope.outer[root]
        shape = program.state_dict[inputs.target(weight)].shape
        dims = input_axes(site.chain, shape, site.axes)
        if dims is None:
            raise PassError(f"{inputs.module(vector)!r}: {site.node.name} uses a view of its weight that has no rows")
        reader = site.chain.nodes[0] if site.chain.nodes else site.node
        uses.append(((weight, vector), AdaptedUse(scope, site.update, reader, root, dims)))
    for node in scope.gm.graph.find_nodes(op="call_function", target=ADAPTED_WEIGHT):
        arguments: Any = node.args
        own, held, axes = arguments
        if own not in scope.outer or held not in scope.outer:
            raise PassError(f"{node.name}: its weight is computed in the graph, so the vector can't be folded")
        uses.append(((scope.outer[own], scope.outer[held]), AdaptedUse(scope, node, node, own, tuple(axes))))
    return uses


def _sites(program: ExportedProgram, inputs: ProgramInputs, scope: Scope) -> list[LinearSite]:
    """The linear sites of one graph, each with its update, also where that is behind a sum."""
    parameters = [node for node, outer in scope.outer.items() if inputs.is_stored(outer)]
    sites = {site.node: site for site in match_linear(scope.gm, parameters)}
    direct = {site.update for site in sites.values()}
    for update in rank1_updates(scope.gm.graph):
        if update in direct:
            continue
        for site in (sites[node] for node in addends(operands(update)[0]) if node in sites):
            if site.update is None and _is_own(program, inputs, scope, site, update):
                sites[site.node] = dataclasses.replace(site, update=update)
                break
    return list(sites.values())


def _is_own(program: ExportedProgram, inputs: ProgramInputs, scope: Scope, site: LinearSite, update: fx.Node) -> bool:
    """Whether the weight of a site is that of the module whose vector the update adds; a tied one has two names."""
    vector = scope.outer.get(operands(update)[2])
    weight = scope.outer.get(site.chain.root) if site.chain is not None else None
    if vector is None or weight is None or not inputs.is_stored(weight):
        return False
    held = program.state_dict
    return held.get(f"{inputs.module(vector)}.weight".removeprefix(".")) is held[inputs.target(weight)]
