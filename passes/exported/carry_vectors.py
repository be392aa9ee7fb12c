"""Leave the vectors of an exported program beside its weights or its activations, each behind an op that names it.

    place="weight"       rank1_update(linear(x, W, c), x, b)  ->  linear(x, adapted_weight(W, vector(b, "name")), c)
    place="activation"   adapted_weight(W, b), rank1_update   ->  add_rank1(y, feature_sum(x), vector(b, "name")),
                                                                  one feature sum for each input
    trained              a head's or a norm's parameter p     ->  vector(p, "name"), where an adapter's values go

`onelora::vector` is the identity.  Exporters fold, merge and rename constants; behind an op that they do not know a
vector stays what it is, whatever they make of the parameter.  "weight" is for runtimes that fold the sum when they
load the model; "activation" for vectors that change from call to call.

The given program is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import fx
from torch.export import ExportedProgram

from onelora_compile.adapting.module_names import clean_name
from onelora_compile.adapting.weight_target import vector_of
from onelora_compile.errors import PassError
from onelora_compile.ops import ADAPTED_WEIGHT, VECTOR
from onelora_compile.passes.exported.changed_program import copied, rebuilt
from onelora_compile.passes.exported.fold_vectors import FoldResult, fold_vectors
from onelora_compile.passes.graph.subgraphs import scopes
from onelora_compile.passes.move_updates import weight_to_activation
from onelora_compile.passes.run import run_passes
from onelora_compile.passes.share_sums import share_feature_sum


def carry_vectors(
    program: ExportedProgram, place: Literal["weight", "activation"], trained: Mapping[str, str] | None = None
) -> tuple[ExportedProgram, FoldResult]:
    """A program that computes the same, with its vectors in one place.

    Args:
        program: not changed.
        place: of the vectors.
        trained: names for parameters and buffers that adapters replace as a whole, by their names in the program.

    Raises:
        PassError: an update whose linear can't be found, or a vector that a higher-order op uses.
    """
    if place == "weight":
        program, result = fold_vectors(program, keep=True)
        gm = copied(program)
    else:
        gm, result = copied(program), FoldResult({}, [])
        run_passes(gm, (weight_to_activation, share_feature_sum))
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    inside = {node for scope in scopes(gm)[1:] for node in scope.outer.values()}
    unused = []
    for node in gm.graph.find_nodes(op="placeholder"):
        target = specs[node.name].target
        if target is None:
            continue
        if whole := (trained or {}).get(clean_name(target)):
            if node.users:
                _named(gm.graph, node, whole)
            continue
        if (name := vector_of(target)) is None:
            continue
        if node in inside and node.users:
            raise PassError(f"{name!r} is used inside a higher-order op, where a vector can't stay by itself: fold it")
        if node.users:
            _named(gm.graph, node, name)
        else:
            unused.append(name)
    gm.recompile()
    return rebuilt(program, gm, specs, dict(program.state_dict)), FoldResult({}, result.unused or unused)


def _named(graph: fx.Graph, vector: fx.Node, name: str) -> None:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.call_function(VECTOR, (vector, name))
    node.meta = vector.meta.copy()
    vector.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    # The sums of place "weight" stand right after the inputs too.
    for user in list(node.users):
        if user.target is ADAPTED_WEIGHT:
            node.append(user)
