"""Fold the vectors of an exported program into its weights; the updates and the vectors disappear.

    rank1_update(linear(x, W, c), x, b)   ->   linear(x, W + b 1ᵀ, c)
    adapted_weight(W, b)                  ->   W + b 1ᵀ, as a parameter

Cases: (1) all uses of W carry the same vector: its value is replaced under its own name; (2) W has another use (a
tied embedding, a module with another vector): each adapted use gets a weight of its own, the others keep W;
(3) graphs of higher-order ops: as (1).  A vector that the graph never uses is dropped.  Fails, naming the module,
where the weight is not a parameter of the program, and in case (2) inside a higher-order op.

The given program is left as it is; tensors that are not folded are shared with it.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from onelora_compile.errors import MergeError, PassError
from onelora_compile.layer import VECTOR
from onelora_compile.merge import FoldLoss, fold_weight
from onelora_compile.ops import ADAPTED_WEIGHT
from onelora_compile.passes.match_linear import match_linear, operands, rank1_updates
from onelora_compile.passes.subgraphs import Scope, scopes
from onelora_compile.passes.weight_chain import input_axes


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

    @property
    def plain(self) -> fx.Node:
        """What stands in the place of the update afterwards."""
        return self.weight if self.update.target is ADAPTED_WEIGHT else operands(self.update)[0]


def fold_vectors(program: ExportedProgram) -> tuple[ExportedProgram, FoldResult]:
    """A program without vectors that computes the same.

    Raises:
        PassError: an update whose linear, or whose weight, can't be found in the program.
        MergeError: a weight that can't take its vector (quantised, or its dtype overflows).
    """
    gm = fx.GraphModule(program.graph_module, _copy(program.graph_module.graph))
    _copy_subgraphs(gm)
    folder = _Folder(gm, program)
    folder.fold()
    folded = ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=folder.signature(),
        state_dict=folder.state,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    return folded, folder.result()


class _Folder:
    """One run of the pass: the new graph, the new state, and the books."""

    def __init__(self, gm: fx.GraphModule, program: ExportedProgram) -> None:
        self.gm = gm
        self.program = program
        self.state: dict[str, Tensor] = dict(program.state_dict)
        self.specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self.scopes = scopes(gm)
        self.losses: dict[str, FoldLoss] = {}
        self.renamed: dict[str, str] = {}  # an update -> what stands in its place, for the names of outputs
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
                raise PassError(
                    f"{self._name_of(update)!r}: the linear below {update.name} was not found; nothing was folded"
                )
        for scope in reversed(self.scopes[1:]):
            self._drop_inputs(scope)
        for vector in self.vectors:
            self.gm.graph.erase_node(vector)
            del self.state[self._target(vector)]
            del self.specs[vector.name]
        for scope in self.scopes:
            scope.gm.recompile()

    def _uses(self, scope: Scope) -> list[tuple[tuple[fx.Node, fx.Node], _Use]]:
        """The adapted uses of weights in one graph, by weight and vector as inputs of the outermost graph."""
        uses = []
        parameters = [node for node, outer in scope.outer.items() if self._is_stored(outer)]
        for site in match_linear(scope.gm, parameters):
            if site.update is None:
                continue
            vector = scope.outer.get(operands(site.update)[2])
            root = site.chain.root if site.chain is not None else None
            if vector is None or root is None or site.chain is None or site.chain.adapted or root not in scope.outer:
                raise PassError(
                    f"{self._name_of(site.update)!r}: its weight is computed in the graph ({site.weight}), so the "
                    "vector can't be folded into it; remove the parametrization first, or merge before the export"
                )
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

    def _fold_group(self, weight: fx.Node, vector: fx.Node, uses: list[_Use]) -> None:
        value, loss = self._value(weight, vector, uses[0].dims)
        readers = {use.reader for use in uses}
        others = [node for node in self._readers(weight) if node not in readers]
        if not others:
            self.state[self._target(weight)] = value
        elif any(use.scope.call is not None for use in uses):
            raise PassError(
                f"{self._module(vector)!r}: its weight has another use and is used inside a higher-order op, where "
                "it can't get a weight of its own; merge before the export"
            )
        else:
            own = self._own_weight(weight, vector, value)
            for use in uses:
                use.reader.replace_input_with(weight, own)
        for use in uses:
            plain = use.reader.args[0] if use.update.target is ADAPTED_WEIGHT else use.plain
            assert isinstance(plain, fx.Node)
            use.update.replace_all_uses_with(plain)
            self.renamed[use.update.name] = plain.name
            use.scope.gm.graph.erase_node(use.update)
        self.losses[self._module(vector)] = loss

    def _readers(self, weight: fx.Node) -> list[fx.Node]:
        """What reads a weight, in all graphs; a higher-order op reads what its graphs read."""
        calls = {scope.call for scope in self.scopes}
        held = [node for scope in self.scopes for node, outer in scope.outer.items() if outer is weight]
        return [user for node in held for user in node.users if user not in calls]

    def _value(self, weight: fx.Node, vector: fx.Node, dims: tuple[int, ...]) -> tuple[Tensor, FoldLoss]:
        # The program's own value, not this run's: another group may have folded into the same name.
        stored = self.program.state_dict[self._target(weight)].detach()
        try:
            value, loss = fold_weight(stored, self.program.state_dict[self._target(vector)], dims)
        except MergeError as error:
            raise MergeError(f"{self._module(vector)!r}: {error}") from None
        return nn.Parameter(value, requires_grad=False), loss

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
        return self._target(node).rpartition(".")[2].startswith(VECTOR)

    def _target(self, node: fx.Node) -> str:
        target = self.specs[node.name].target
        assert target is not None
        return target

    def _module(self, vector: fx.Node) -> str:
        """The name of a vector, from that of its parameter."""
        module, _, own = self._target(vector).rpartition(".")
        parameter = own.removeprefix(VECTOR).removeprefix("_")
        return f"{module}.{parameter}".strip(".")

    def _name_of(self, update: fx.Node) -> str:
        vector = operands(update)[2]
        return self._module(vector) if vector.name in self.specs else update.name

    def signature(self) -> ExportGraphSignature:
        inputs = [self.specs[node.name] for node in self.gm.graph.find_nodes(op="placeholder")]
        outputs = []
        for spec in self.program.graph_signature.output_specs:
            name = self.renamed.get(getattr(spec.arg, "name", ""))
            outputs.append(dataclasses.replace(spec, arg=TensorArgument(name)) if name else spec)
        return ExportGraphSignature(inputs, outputs)

    def result(self) -> FoldResult:
        return FoldResult(self.losses, self.unused)


def _without(tree: Any, gone: set[fx.Node]) -> Any:
    """Arguments less some nodes, in lists and tuples of any depth."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(_without(part, gone) for part in tree if part not in gone)
    if isinstance(tree, dict):
        return {key: _without(part, gone) for key, part in tree.items()}
    return tree


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
