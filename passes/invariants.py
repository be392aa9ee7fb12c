"""The invariants of the graphs between passes, as executable rules.

1. The graph is well-formed (`lint`): every argument is defined before its use.
2. No vector is lost: a graph input or attribute that was a vector before still has a user.
3. Every update by a vector [n] has n = its linear's out_features, and a feature sum of width 1.
"""

from __future__ import annotations

from torch import fx

from onelora_compile.errors import PassError
from onelora_compile.ops import ADAPTED_WEIGHT, ADD_RANK1
from onelora_compile.passes.sites.linear_site import example, operands, rank1_updates


def vectors_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that hold a vector, each once."""
    held = [operands(update)[2] for update in rank1_updates(gm.graph)]
    held += [node.args[1] for node in gm.graph.find_nodes(op="call_function", target=ADAPTED_WEIGHT) if node.users]
    return list(dict.fromkeys(held))


def verify(gm: fx.GraphModule, vectors: list[fx.Node]) -> None:
    """Check the graph; `vectors` are those that it had before the passes.

    Raises:
        PassError: an invariant does not hold; the message names the node.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise PassError(f"the graph is not well-formed: {error}") from error
    for held in vectors:
        if not held.users:
            raise PassError(f"the vector {held.name!r} lost its last user: its linear would not be adapted")
    for update in rank1_updates(gm.graph):
        y, s, vector = map(example, operands(update))
        lone = vector is not None and vector.ndim == 1
        if y is not None and vector is not None and lone and y.shape[-1] != vector.shape[-1]:
            raise PassError(f"{update.name}: a vector of {vector.shape[-1]} entries on {y.shape[-1]} features")
        if update.target is ADD_RANK1 and s is not None and lone and s.shape[-1] != 1:
            raise PassError(f"{update.name}: a feature sum of width {s.shape[-1]}")
