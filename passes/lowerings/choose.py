"""Which lowering an update gets: forced, by rule on a CPU, measured on a GPU.

forced       options={"lowering": name}: that one where it can, else the default, with the reason
on a CPU     producer_consumer: the only one that wins there (benchmarks/results)
on a GPU     where more than one can: the fastest, forward and backward, measured on this GPU for this shape; the
             default stays unless another is more than 2 % faster, and right on that GPU
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from onelora_compile.passes.lowerings.fused_kernel import FUSED_KERNEL
from onelora_compile.passes.lowerings.lowering import DYNAMIC, Choice, Lowering, Shape, Update
from onelora_compile.passes.lowerings.measured import seconds
from onelora_compile.passes.lowerings.producer_consumer import PRODUCER_CONSUMER

LOWERINGS: dict[str, Lowering] = {lowering.name: lowering for lowering in (PRODUCER_CONSUMER, FUSED_KERNEL)}
DEFAULT = PRODUCER_CONSUMER.name
MARGIN = 0.98  # of the default's time: below the noise of a measurement nothing is won

Seconds = Callable[[Shape, Sequence[str], str], Mapping[str, float]]


def choose(
    update: Update,
    forced: str | None = None,
    lowerings: Mapping[str, Lowering] = LOWERINGS,
    measure: Seconds = seconds,
) -> Choice:
    """The lowering of an update, and why.

    Args:
        update: to be lowered.
        forced: the name that the user asked for, None for the best.
        lowerings: what there is to choose from; the default among them.
        measure: seconds of one forward and backward by each of some lowerings, for a shape on a device.
    """
    if forced is not None:
        reason = lowerings[forced].why_not(update)
        return Choice(forced, "forced") if reason is None else Choice(DEFAULT, f"{forced}: {reason}")
    if update.device.type == "cpu":
        return Choice(DEFAULT, "the rule on a CPU")
    reasons = {name: lowering.why_not(update) for name, lowering in lowerings.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    if len(able) == 1:
        others = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
        return Choice(able[0], f"the only one ({others})" if others else "the only one")
    if (shape := update.shape()) is None:
        return Choice(DEFAULT, DYNAMIC)
    times = measure(shape, able, str(update.device))
    fastest = min(able, key=times.__getitem__)
    name = fastest if times[fastest] < MARGIN * times[DEFAULT] else DEFAULT
    listed = ", ".join(f"{one} {1e6 * times[one]:.0f}" if times[one] < math.inf else f"{one} failed" for one in able)
    return Choice(name, f"measured, microseconds: {listed}")
