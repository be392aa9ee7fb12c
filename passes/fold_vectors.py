"""Fold the vectors of an exported program into its weights; the updates and the vectors disappear.

    rank1_update(linear(x, W, c), x, b)   ->   linear(x, W + b 1ᵀ, c)

Cases: (1) all uses of W carry the same vector: its value is replaced under its own name; (2) W has another use (a
tied embedding, a module with another vector): each adapted use gets a weight of its own, the others keep W;
(3) W is stored [in_features, out_features]: b is added along the other axis.  A vector that the graph never uses
is dropped.  Fails, naming the module, where the weight is not a parameter of the program.

The given program is left as it is; tensors that are not folded are shared with it.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from onelora_compile.errors import MergeError, PassError
from onelora_compile.layer import VECTOR
from onelora_compile.merge import FoldLoss, fold_weight
from onelora_compile.passes.match_linear import LinearSite, match_linear, operands, rank1_updates


@dataclasses.dataclass(frozen=True)
class FoldResult:
    """What the pass did.

    Attributes:
        losses: what rounding lost, by the name of the vector's module.
        unused: modules whose vector the program does not use, so that nothing had to be folded.
    """

    losses: dict[str, FoldLoss]
    unused: list[str]


def fold_vectors(program: ExportedProgram) -> tuple[ExportedProgram, FoldResult]:
    """A program without vectors that computes the same.

    Raises:
        PassError: an update whose linear, or whose weight, can't be found in the program.
        MergeError: a weight that can't take its vector (quantised, or its dtype overflows).
    """
    gm = fx.GraphModule(program.graph_module, _copy(program.graph_module.graph))
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
        self.losses: dict[str, FoldLoss] = {}
        self.renamed: dict[str, str] = {}  # an update -> what stands in its place, for the names of outputs
        self.vectors = [
            node
            for node in gm.graph.find_nodes(op="placeholder")
            if self.specs[node.name].kind is InputKind.PARAMETER and self._target(node).split(".")[-1] == VECTOR
        ]
        self.unused = [self._module(node) for node in self.vectors if not node.users]

    def fold(self) -> None:
        groups: dict[tuple[fx.Node, fx.Node], list[LinearSite]] = {}
        for site in match_linear(self.gm):
            if site.update is not None:
                groups.setdefault(self._operands(site), []).append(site)
        for (weight, vector), sites in groups.items():
            self._fold_group(weight, vector, sites)
        for update in list(rank1_updates(self.gm.graph)):
            raise PassError(
                f"{self._name_of(update)!r}: the linear below {update.name} was not found; nothing was folded"
            )
        for vector in self.vectors:
            self.gm.graph.erase_node(vector)
            del self.state[self._target(vector)]
            del self.specs[vector.name]
        self.gm.recompile()

    def _fold_group(self, weight: fx.Node, vector: fx.Node, sites: list[LinearSite]) -> None:
        value, loss = self._value(weight, vector, sites[0].transposed)
        if set(weight.users) == {site.node for site in sites}:
            self.state[self._target(weight)] = value
        else:
            own = self._own_weight(weight, vector, value)
            for site in sites:
                site.node.replace_input_with(weight, own)
        for site in sites:
            assert site.update is not None
            plain = operands(site.update)[0]
            site.update.replace_all_uses_with(plain)
            self.renamed[site.update.name] = plain.name
            self.gm.graph.erase_node(site.update)
        self.losses[self._module(vector)] = loss

    def _value(self, weight: fx.Node, vector: fx.Node, transposed: bool) -> tuple[Tensor, FoldLoss]:
        # The program's own value, not this run's: another group may have folded into the same name.
        stored = self.program.state_dict[self._target(weight)].detach()
        try:
            value, loss = fold_weight(stored.T if transposed else stored, self.program.state_dict[self._target(vector)])
        except MergeError as error:
            raise MergeError(f"{self._module(vector)!r}: {error}") from None
        value = value.T.contiguous() if transposed else value
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

    def _operands(self, site: LinearSite) -> tuple[fx.Node, fx.Node]:
        weight, vector = site.weight, site.vector
        assert vector is not None
        if weight is None or self.specs.get(weight.name) is None or self.specs[weight.name].target is None:
            raise PassError(
                f"{self._module(vector)!r}: its weight is computed in the graph ({weight}), so the vector can't be "
                "folded into it; remove the parametrization first, or merge before the export"
            )
        return weight, vector

    def _target(self, node: fx.Node) -> str:
        target = self.specs[node.name].target
        assert target is not None
        return target

    def _module(self, vector: fx.Node) -> str:
        return self._target(vector).rpartition(".")[0]

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


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, nodes, return_output_node=True)
    assert isinstance(output, tuple)
    value, old = output
    copy.output(value).meta = dict(old.meta)
    copy.set_codegen(graph._codegen)
    for before, after in nodes.items():
        after.name = before.name  # the signature knows nodes by name; a copy renames 'input' and other builtins
    return copy
