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

from onelora_compile.errors import MergeError, PassError
from onelora_compile.ops import ADAPTED_WEIGHT
from onelora_compile.passes.exported.adapted_uses import OUTPUT_ONLY, AdaptedUse, ProgramInputs, adapted_uses
from onelora_compile.passes.exported.changed_program import copied, rebuilt
from onelora_compile.passes.graph.subgraphs import Scope, scopes
from onelora_compile.passes.sites.linear_site import operands, rank1_updates
from onelora_compile.weights.merge import FoldLoss, fold_weight


@dataclasses.dataclass(frozen=True)
class FoldResult:
    """What the pass did.

    Attributes:
        losses: what rounding lost, by the name of the vector.
        unused: names of vectors that the program does not use, so that nothing had to be folded.
    """

    losses: dict[str, FoldLoss]
    unused: list[str]


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
    return rebuilt(program, gm, folder.inputs.specs, folder.state), folder.result()


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
        self.inputs = ProgramInputs(program)
        self.scopes = scopes(gm)
        self.losses: dict[str, FoldLoss] = {}
        self.vectors = [node for node in gm.graph.find_nodes(op="placeholder") if self.inputs.is_vector(node)]
        self.unused = [self.inputs.module(node) for node in self.vectors if not node.users]

    def fold(self) -> None:
        groups: dict[tuple[fx.Node, fx.Node], list[AdaptedUse]] = {}
        for scope in self.scopes:
            for key, use in adapted_uses(self.program, self.inputs, scope):
                groups.setdefault(key, []).append(use)
        for (weight, vector), uses in groups.items():
            self._fold_group(weight, vector, uses)
        for scope in self.scopes:
            for update in rank1_updates(scope.gm.graph):
                raise PassError(f"{self.inputs.name_of(update)!r}: {OUTPUT_ONLY}")
        for scope in reversed(self.scopes[1:]):
            self._drop_inputs(scope)
        for vector in self.vectors:
            if not vector.users:
                self.gm.graph.erase_node(vector)
                del self.state[self.inputs.target(vector)]
                del self.inputs.specs[vector.name]
        for scope in self.scopes:
            scope.gm.recompile()

    def _fold_group(self, weight: fx.Node, vector: fx.Node, uses: list[AdaptedUse]) -> None:
        value, loss = self._value(weight, vector, uses[0].dims)
        module = self.inputs.module(vector)
        self.losses[module] = loss
        readers = {use.reader for use in uses}
        own = weight
        if self.keep or any(node not in readers for node in self._readers(weight)):
            if any(use.scope.call is not None for use in uses):
                raise PassError(
                    f"{module!r}: its weight is used inside a higher-order op, where it can't get a "
                    "weight of its own (it has another use, or the vector is to stay beside it); fold or merge it"
                )
            own = self._sum(weight, vector, uses[0].dims) if self.keep else self._own_weight(weight, vector, value)
        else:
            self.state[self.inputs.target(weight)] = value
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
        stored = self.program.state_dict[self.inputs.target(weight)].detach()
        exact = self.originals.get(self.inputs.target(weight), stored).detach()
        try:
            held = self.program.state_dict[self.inputs.target(vector)]
            value, loss = fold_weight(exact, held, dims, stored.dtype)
            if self.stored not in (None, stored.dtype):
                with contextlib.suppress(MergeError):  # what that dtype can't hold stays in the program's
                    _, loss = fold_weight(exact, held, dims, self.stored)
        except MergeError as error:
            helps = "; export_onnx(keep_float32='auto') leaves it in float32" if stored.dtype is torch.float16 else ""
            raise MergeError(f"{self.inputs.module(vector)!r}: {error}{helps}") from None
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
        target = self.inputs.module(vector) + ".weight_folded"
        with self.gm.graph.inserting_before(weight):
            node = self.gm.graph.placeholder("p_" + target.replace(".", "_"))
        node.meta = weight.meta.copy()
        self.state[target] = value
        self.inputs.specs[node.name] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target)
        return node

    def _drop_inputs(self, scope: Scope) -> None:
        """Take vectors that nothing reads any more out of the inputs of a subgraph, and of the op that runs it."""
        assert scope.call is not None
        gone = [node for node, outer in scope.outer.items() if outer in self.vectors]
        for node in gone:
            if node.users:
                raise PassError(f"{self.inputs.module(scope.outer[node])!r} is still used in a higher-order op")
            scope.gm.graph.erase_node(node)
        around = next(s for s in self.scopes if scope.call.graph is s.gm.graph)
        held = {node for node, outer in around.outer.items() if outer in self.vectors}
        scope.call.args = _without(scope.call.args, held)
        scope.call.kwargs = _without(scope.call.kwargs, held)

    def result(self) -> FoldResult:
        return FoldResult(self.losses, self.unused)


def _without(tree: Any, gone: set[fx.Node]) -> Any:
    """Arguments less some nodes, in lists and tuples of any depth."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(_without(part, gone) for part in tree if part not in gone)
    if isinstance(tree, dict):
        return {key: _without(part, gone) for key, part in tree.items()}
    return tree
