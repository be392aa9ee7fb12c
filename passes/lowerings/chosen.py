"""Which lowering an update gets: `producer_consumer`, or the one that the user asked for where it can be taken.

Nothing is estimated or timed here.  A lowering becomes the rule when a measurement in benchmarks/results shows where it
wins; `fused_kernel` has run on no GPU yet, so it is taken by `options={"lowering": "fused_kernel"}` alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from onelora_compile.passes.lowerings.fused_kernel import FUSED_KERNEL
from onelora_compile.passes.lowerings.lowering import Choice, Lowering, Update
from onelora_compile.passes.lowerings.producer_consumer import PRODUCER_CONSUMER

LOWERINGS: dict[str, Lowering] = {lowering.name: lowering for lowering in (PRODUCER_CONSUMER, FUSED_KERNEL)}
DEFAULT = PRODUCER_CONSUMER.name


def choose(update: Update, forced: str | None = None, lowerings: Mapping[str, Lowering] = LOWERINGS) -> Choice:
    """The lowering of an update, and why.

    Args:
        update: to be lowered.
        forced: the name that the user asked for, None for the rule.
        lowerings: what there is to choose from; the default among them.
    """
    if forced is None:
        return Choice(DEFAULT, "the rule")
    reason = lowerings[forced].why_not(update)
    return Choice(forced, "forced") if reason is None else Choice(DEFAULT, f"{forced}: {reason}")
