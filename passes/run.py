"""Run the passes in order, with checks and times; the order and its reasons are here."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence

from torch import fx

from onelora_compile.errors import PassError
from onelora_compile.passes.fuse_updates import fuse_rank1
from onelora_compile.passes.invariants import vectors_of, verify
from onelora_compile.passes.move_updates import weight_to_activation
from onelora_compile.passes.open_attention import expand_attention
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.share_sums import share_feature_sum

log = logging.getLogger("onelora_compile.passes")

Pass = Callable[[fx.GraphModule], PassResult]

PIPELINE: tuple[Pass, ...] = (
    expand_attention,  # before whatever looks for linears
    weight_to_activation,  # before share: it makes updates, whose sums can be shared
    share_feature_sum,  # before fuse: a lowering must know whether the sum is its own or a sibling's too
    fuse_rank1,
)


def pipeline(lowering: str | None = None) -> tuple[Pass, ...]:
    """The passes of the backend, for `run_passes`.

    Args:
        lowering: the name of the one to take where it can be taken (`LOWERINGS`); None for the rule.
    """
    return (*PIPELINE[:-1], functools.partial(fuse_rank1, lowering=lowering))


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass] = PIPELINE) -> list[PassResult]:
    """Run passes over a graph and the subgraphs of its higher-order ops, in place, and recompile it.

    Args:
        gm: changed in place.
        passes: in order.

    Raises:
        PassError: a pass failed or broke an invariant; the message names it and those that ran before.
    """
    results: list[PassResult] = []
    graphs = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    vectors = {graph: vectors_of(graph) for graph in graphs}
    for one in passes:
        name = getattr(getattr(one, "func", one), "__name__", str(one))
        total = PassResult(name)
        start = time.perf_counter()
        for graph in graphs:
            try:
                result = one(graph)
                verify(graph, vectors[graph])
            except Exception as error:
                before = [done.name for done in results]
                raise PassError(f"pass {name} failed after {before}: {error}") from error
            total.rewrites += result.rewrites
            total.skips |= result.skips
            log.debug("after %s:\n%s", name, graph.graph)
        total.seconds = time.perf_counter() - start
        results.append(total)
    for graph in graphs:
        graph.recompile()
    return results
