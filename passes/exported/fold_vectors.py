"""Fold the vectors of an exported program into its weights; the updates and the vectors disappear.

    rank1_update(linear(x, W, c), x, b)       ->   linear(x, W + b 1ᵀ, c)
    rank1_update(linear(x, W, c) + r, x, b)   ->   linear(x, W + b 1ᵀ, c) + r      (a linear with a residual of its own)
    adapted_weight(W, b)                      ->   W + b 1ᵀ, as a parameter

Cases: (1) all uses of W carry the same vector: its value is replaced under its own name; (2) W has another use (a
tied embedding, a module with another vector): each adapted use gets a weight of its own, the others keep W;
(3) graphs of higher-order ops: as (1).  A vector that the graph never uses is dropped.  Fails, naming the module,
where the weight is not a parameter of the program, and in case (2) inside a higher-order op.

With keep=True the sums stay in the graph, for a runtime that folds them when it loads the model:

    rank1_update(linear(x, W, c), x, b)   ->   linear(x, adapted_weight(W, b), c)

The given program is left as it is; tensors that are not folded are shared with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from onelora_compile.adapting.weight_target import vector_of
from onelora_compile.errors import MergeError, PassError
from onelora_compile.ops import ADAPTED_WEIGHT
from onelora_compile.passes.exported.changed_program import copied, rebuilt
from onelora_compile.passes.exported.update_source import addends, is_output_of
from onelora_compile.passes.graph.subgraphs import Scope, scopes
from onelora_compile.passes.sites.linear_site import LinearSite, match_linear, operands, rank1_updates
from onelora_compile.passes.sites.weight_path import input_axes
from onelora_compile.weights.merge import FoldLoss, fold_weight

OUTPUT_ONLY = (
    "the module computes something else than W x + c (it scales, quantises or activates), so the vector, which adds to "
    "its output, can't go into its weight; export with adapters='input' or 'bank', leave it out with exclude_modules, "
    "or, if onelora.merge takes a copy of the model, export that"
)


@dataclasses.dataclass(frozen=True)
class FoldResult:
    """What the pass did.

    Attributes:
        losses: what rounding lost, by the name of the vector.
        unused: names of vectors that the program does not use, so that nothing had to be folded.
    """

    losses: dict[str, FoldLoss]
    unused: list[str]


@dataclasses.dataclass(frozen=True)
class _Use:
    """One adapted use of a weight: the node that says so, and the node that reads the weight."""

    scope: Scope
    update: fx.Node
    reader: fx.Node
    weight: fx.Node  # in the scope's own graph
    dims: tuple[int, ...]


def fold_vectors(
    program: ExportedProgram,
    keep: bool = False,
    originals: Mapping[str, Tensor] | None = None,
    stored: torch.dtype | None = None,
) -> tuple[ExportedProgram, FoldResult]:
    """A program that computes the same with vectors in its weights.

    Args:
        program: as exported from an adapted model; not changed.
        keep: leave the sums W + b 1ᵀ in the graph, and the vectors parameters of the program.
        originals: weights of the same names in a wider dtype, from before the program's were rounded: what is folded
            is rounded once, to the program's dtype.
        stored: the dtype that the weights will be stored in later, which the losses are of; None is the program's.

    Raises:
        PassError: an update whose linear, or whose weight, can't be found in the program.
        MergeError: a weight that can't take its vector (quantised, or its dtype overflows).
    """
    gm = copied(program)
    folder = _Folder(gm, program, keep, originals or {}, stored)
    folder.fold()
    return rebuilt(program, gm, folder.specs, folder.state), folder.result()


class _Folder:
    """One run of the pass: the new graph, the new state, and the books."""

    def __init__(
        self,
        gm: fx.GraphModule,
        program: ExportedProgram,
        keep: bool,
        originals: Mapping[str, Tensor],
        stored: torch.dtype | None,
    ) -> None:
        self.gm = gm
        self.program = program
        self.keep = keep
        self.originals = originals
        self.stored = stored
        self.state: dict[str, Tensor] = dict(program.state_dict)
        self.specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self.scopes = scopes(gm)
        self.losses: dict[str, FoldLoss] = {}
        self.vectors = [node for node in gm.graph.find_nodes(op="placeholder") if self._is_vector(node)]
        self.unused = [self._module(node) for node in self.vectors if not node.users]

    def fold(self) -> None:
        groups: dict[tuple[fx.Node, fx.Node], list[_Use]] = {}
        for scope in self.scopes:
            for key, use in self._uses(scope):
                groups.setdefault(key, []).append(use)
        for (weight, vector), uses in groups.items():
            self._fold_group(weight, vector, uses)
        for scope in self.scopes:
            for update in rank1_updates(scope.gm.graph):
                raise PassError(f"{self._name_of(update)!r}: {OUTPUT_ONLY}")
        for scope in reversed(self.scopes[1:]):
            self._drop_inputs(scope)
        for vector in self.vectors:
            if not vector.users:
                self.gm.graph.erase_node(vector)
                del self.state[self._target(vector)]
                del self.specs[vector.name]
        for scope in self.scopes:
            scope.gm.recompile()

    def _uses(self, scope: Scope) -> list[tuple[tuple[fx.Node, fx.Node], _Use]]:
        """The adapted uses of weights in one graph, by weight and vector as inputs of the outermost graph."""
        uses = []
        for site in self._sites(scope):
            if site.update is None:
                continue
            vector = scope.outer.get(operands(site.update)[2])
            root = site.chain.root if site.chain is not None else None
            if vector is None or root is None or site.chain is None or site.chain.adapted or root not in scope.outer:
                raise PassError(
                    f"{self._name_of(site.update)!r}: its weight is computed in the graph ({site.weight}), so the "
                    "vector can't be folded into it; remove the parametrization first, or merge before the export"
                )
            if not is_output_of(site):
                raise PassError(f"{self._name_of(site.update)!r}: {OUTPUT_ONLY}")
            weight = scope.outer[root]
            shape = self.program.state_dict[self._target(weight)].shape
            dims = input_axes(site.chain, shape, site.axes)
            if dims is None:
                raise PassError(
                    f"{self._module(vector)!r}: {site.node.name} uses a view of its weight that has no rows"
                )
            reader = site.chain.nodes[0] if site.chain.nodes else site.node
            uses.append(((weight, vector), _Use(scope, site.update, reader, root, dims)))
        for node in scope.gm.graph.find_nodes(op="call_function", target=ADAPTED_WEIGHT):
            arguments: Any = node.args
            own, held, axes = arguments
            if own not in scope.outer or held not in scope.outer:
                raise PassError(f"{node.name}: its weight is computed in the graph, so the vector can't be folded")
            uses.append(((scope.outer[own], scope.outer[held]), _Use(scope, node, node, own, tuple(axes))))
        return uses

    def _sites(self, scope: Scope) -> list[LinearSite]:
        """The linear sites of one graph, each with its update, also where that is behind a sum."""
        parameters = [node for node, outer in scope.outer.items() if self._is_stored(outer)]
        sites = {site.node: site for site in match_linear(scope.gm, parameters)}
        direct = {site.update for site in sites.values()}
        for update in rank1_updates(scope.gm.graph):
            if update in direct:
                continue
            for site in (sites[node] for node in addends(operands(update)[0]) if node in sites):
                if site.update is None and self._is_own(scope, site, update):
                    sites[site.node] = dataclasses.replace(site, update=update)
                    break
        return list(sites.values())

    def _is_own(self, scope: Scope, site: LinearSite, update: fx.Node) -> bool:
        """Whether the weight of a site is that of the module whose vector the update adds; a tied one has two names."""
        vector = scope.outer.get(operands(update)[2])
        weight = scope.outer.get(site.chain.root) if site.chain is not None else None
        if vector is None or weight is None or not self._is_stored(weight):
            return False
        held = self.program.state_dict
        return held.get(f"{self._module(vector)}.weight".removeprefix(".")) is held[self._target(weight)]

    def _fold_group(self, weight: fx.Node, vector: fx.Node, uses: list[_Use]) -> None:
        value, loss = self._value(weight, vector, uses[0].dims)
        self.losses[self._module(vector)] = loss
        readers = {use.reader for use in uses}
        own = weight
        if self.keep or any(node not in readers for node in self._readers(weight)):
            if any(use.scope.call is not None for use in uses):
                raise PassError(
                    f"{self._module(vector)!r}: its weight is used inside a higher-order op, where it can't get a "
                    "weight of its own (it has another use, or the vector is to stay beside it); fold or merge it"
                )
            own = self._sum(weight, vector, uses[0].dims) if self.keep else self._own_weight(weight, vector, value)
        else:
            self.state[self._target(weight)] = value
        for use in uses:
            if use.update.target is ADAPTED_WEIGHT:
                plain = own if use.scope.call is None else use.weight
            else:
                plain = operands(use.update)[0]
                if own is not weight:
                    use.reader.replace_input_with(weight, own)
            use.update.replace_all_uses_with(plain)
            use.scope.gm.graph.erase_node(use.update)

    def _readers(self, weight: fx.Node) -> list[fx.Node]:
        """What reads a weight, in all graphs; a higher-order op reads what its graphs read."""
        calls = {scope.call for scope in self.scopes}
        held = [node for scope in self.scopes for node, outer in scope.outer.items() if outer is weight]
        return [user for node in held for user in node.users if user not in calls]

    def _value(self, weight: fx.Node, vector: fx.Node, dims: tuple[int, ...]) -> tuple[Tensor, FoldLoss]:
        # The program's own value, not this run's: another group may have folded into the same name.
        stored = self.program.state_dict[self._target(weight)].detach()
        exact = self.originals.get(self._target(weight), stored).detach()
        try:
            held = self.program.state_dict[self._target(vector)]
            value, loss = fold_weight(exact, held, dims, stored.dtype)
            if self.stored not in (None, stored.dtype):
                with contextlib.suppress(MergeError):  # what that dtype can't hold stays in the program's
                    _, loss = fold_weight(exact, held, dims, self.stored)
        except MergeError as error:
            helps = "; export_onnx(keep_float32='auto') leaves it in float32" if stored.dtype is torch.float16 else ""
            raise MergeError(f"{self._module(vector)!r}: {error}{helps}") from None
        return nn.Parameter(value, requires_grad=False), loss

    def _sum(self, weight: fx.Node, vector: fx.Node, dims: tuple[int, ...]) -> fx.Node:
        """The sum as a node of the graph."""
        last = self.gm.graph.find_nodes(op="placeholder")[-1]
        with self.gm.graph.inserting_after(last):
            node = self.gm.graph.call_function(ADAPTED_WEIGHT, (weight, vector, list(dims)))
        node.meta = weight.meta.copy()
        return node

    def _own_weight(self, weight: fx.Node, vector: fx.Node, value: Tensor) -> fx.Node:
        """A new parameter for one adapted use of a shared weight."""
        target = self._module(vector) + ".weight_folded"
        with self.gm.graph.inserting_before(weight):
            node = self.gm.graph.placeholder("p_" + target.replace(".", "_"))
        node.meta = weight.meta.copy()
        self.state[target] = value
        self.specs[node.name] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target)
        return node

    def _drop_inputs(self, scope: Scope) -> None:
        """Take vectors that nothing reads any more out of the inputs of a subgraph, and of the op that runs it."""
        assert scope.call is not None
        gone = [node for node, outer in scope.outer.items() if outer in self.vectors]
        for node in gone:
            if node.users:
                raise PassError(f"{self._module(scope.outer[node])!r} is still used in a higher-order op")
            scope.gm.graph.erase_node(node)
        around = next(s for s in self.scopes if scope.call.graph is s.gm.graph)
        held = {node for node, outer in around.outer.items() if outer in self.vectors}
        scope.call.args = _without(scope.call.args, held)
        scope.call.kwargs = _without(scope.call.kwargs, held)

    def _is_stored(self, node: fx.Node) -> bool:
        spec = self.specs.get(node.name)
        return spec is not None and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None

    def _is_vector(self, node: fx.Node) -> bool:
        if self.specs[node.name].kind is not InputKind.PARAMETER:
            return False
        return vector_of(self._target(node)) is not None

    def _target(self, node: fx.Node) -> str:
        target = self.specs[node.name].target
        assert target is not None
        return target

    def _module(self, vector: fx.Node) -> str:
        name = vector_of(self._target(vector))
        assert name is not None
        return name

    def _name_of(self, update: fx.Node) -> str:
        vector = operands(update)[2]
        return self._module(vector) if vector.name in self.specs else update.name

    def result(self) -> FoldResult:
        return FoldResult(self.losses, self.unused)


def _without(tree: Any, gone: set[fx.Node]) -> Any:
    """Arguments less some nodes, in lists and tuples of any depth."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(_without(part, gone) for part in tree if part not in gone)
    if isinstance(tree, dict):
        return {key: _without(part, gone) for key, part in tree.items()}
    return tree
