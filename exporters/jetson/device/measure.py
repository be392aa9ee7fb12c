"""Whether the engine computes what the model computed at packing, and how long it takes."""

from __future__ import annotations

import math
import time
from typing import Any, Callable, NamedTuple

from .adapters import BASE, BUILT
from .deployed import Deployed
from .folder import BundleError, Folder
from .tensors import Tensor, TensorError, difference, read_safetensors

LARGEST = 65504.0  # of float16


class Check(NamedTuple):
    """One output of one case with one adapter.

    Attributes:
        case: the shapes: "opt" or "min".
        adapter: name of the adapter, with "(again)" when it is used a second time.
        output: name of the output.
        relative: largest difference over the largest magnitude expected.
        allowed: what `relative` may be.
        effect: how far the adapter moves this output from the base's, in the same measure; a difference can be told
            from "no adapter" only if this is larger than what is allowed.
        wrong: what the output is where it is NaN, infinite, or one number everywhere and should not be; "" elsewhere.
    """

    case: str
    adapter: str
    output: str
    relative: float
    allowed: float
    effect: float
    wrong: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within what is allowed; NaN is not."""
        return self.relative <= self.allowed

    @property
    def tells(self) -> bool:
        """Whether a model that ignores its adapter would have failed."""
        return self.effect > 2 * self.allowed


def selftest(model: Deployed, tolerance: float | None = None) -> list[Check]:
    """Compare with the stored reference: every adapter that needs no other engine, and the first one once more.

    The adapter of `model` is the same afterwards.

    Raises:
        BundleError: the bundle was made without reference tensors.
    """
    cases = references(model.folder)
    if not cases:
        raise BundleError("this bundle was made without reference tensors (selftest=False): nothing to compare with")
    own, checks = model.adapter, []
    own_engine = model.options.engine_each(model.folder.traits)
    fixed = model.folder.traits.fixed or own_engine
    if model.folder.traits.refits and not own_engine:  # as it was built, before the first refit
        model.reopen()
        for case, tensors in cases.items():
            checks += _compare(model, case, tensors, BUILT, "", tolerance)
    names = [own["name"]] if fixed else [name for name in model.folder.packed()]
    known = [name for name in names if name in model.folder.packed()]
    for name in [*known, *known[:1]] if len(known) > 1 else known:
        again = " (again)" if any(check.adapter == name for check in checks) else ""
        if not fixed:
            model.use(name)
        for case, tensors in cases.items():
            checks += _compare(model, case, tensors, name, again, tolerance)
    if not fixed:
        model.try_on(own)
    return checks


def suspects(model: Deployed, checks: list[Check]) -> list[str]:
    """What would explain that checks failed: outputs that are NaN, infinite or constant, and known faults."""
    failed = [check for check in checks if not check.passed]
    lines = [
        f"output {check.output!r} with adapter {check.adapter!r}: {check.wrong}" for check in failed if check.wrong
    ]
    if any(check.wrong for check in failed):
        lines += _nearest(model.folder)
    if model.engine.faults is None:
        return lines
    lines += [f"known fault: {fault}\n  -> {fault.cure}" for fault in model.engine.faults]
    return lines if model.engine.faults else [*lines, _NO_FAULT.format(model.engine.label)]


_NO_FAULT = "note: no fault that is known of {} fits the graph of this model"
_NEAR = 8.0  # times smaller than the largest number of float16


def _nearest(folder: Folder) -> list[str]:
    """The values of the model that are nearest to the end of float16, of which the first is the likely beginning."""
    values = folder.manifest["model"].get("values") or []
    near = [one for one in values if one["largest"] * _NEAR > LARGEST and one["dtype"] == "float16"]
    if not near:
        return [
            "no value of the model was near the end of float16 at packing; `selftest --layers` finds where it starts"
        ]
    named = ", ".join(f"{one['name']} ({one['op']}, {one['largest']:.3g})" for one in near[:5])
    return [f"nearest to the end of float16 at packing, in order: {named}; `selftest --layers` finds where it starts"]


def references(folder: Folder) -> dict[str, dict[str, Tensor]]:
    """The stored tensors of each case: `inputs/<name>` and `outputs/<adapter>/<name>`."""
    try:
        return {
            str(entry["case"]): read_safetensors(folder.file(*entry["file"].split("/")))[0]
            for entry in folder.manifest["reference"]
        }
    except (TensorError, OSError) as error:
        raise BundleError(str(error)) from None


def inputs_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a case."""
    return {name[len("inputs/") :]: value for name, value in tensors.items() if name.startswith("inputs/")}


def _compare(
    model: Deployed, case: str, tensors: dict[str, Tensor], name: str, again: str, tolerance: float | None
) -> list[Check]:
    found = model.run(inputs_of(tensors))
    checks = []
    for output in model.outputs:
        expected = tensors[f"outputs/{name}/{output}"]
        base = tensors.get(f"outputs/{BASE}/{output}")
        effect = difference(expected, base)[1] if base is not None else float("inf")
        allowed = model.folder.manifest["tolerance"][output] if tolerance is None else tolerance
        try:
            relative = difference(expected, found[output])[1]
        except TensorError as error:
            raise BundleError(f"output {output!r} has {error}") from None
        told = "" if relative <= allowed else wrong(found[output], expected)
        checks.append(Check(case, name + again, output, relative, allowed, effect, told))
    return checks


def wrong(found: Tensor, expected: Tensor | None = None) -> str:
    """What a tensor is that can't be right: NaN, infinite, or one number where others are expected; "" elsewhere."""
    values = found.values()
    for what, is_so in (("NaN", math.isnan), ("infinite", math.isinf)):
        count = sum(map(is_so, values)) if found.dtype.startswith(("float", "bfloat")) else 0
        if count and (expected is None or expected.is_finite()):
            return f"{count} of {len(values)} entries are {what}"
    if expected is not None and len(values) > 1 and len(set(values)) == 1 and len(set(expected.values())) > 1:
        return f"all {len(values)} entries are {values[0]:g}"
    return ""


def smoke(model: Deployed) -> None:
    """Run the reference inputs with the adapter in use: an adapter that makes NaN is refused before it is in use.

    Raises:
        BundleError: an output is NaN or infinite where it was not with the bundle's own adapter.
    """
    for tensors in references(model.folder).values():
        for output, value in model.run(inputs_of(tensors)).items():
            default = tensors.get(f"outputs/{model.folder.manifest['default']}/{output}")
            if not value.is_finite() and (default is None or default.is_finite()):
                raise BundleError(f"with adapter {model.adapter['name']!r} output {output!r} is NaN or infinite")


class Latency(NamedTuple):
    """Milliseconds of a run: the middle, the slowest of a hundred, and the mean."""

    p50: float
    p99: float
    mean: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        """From single times; p99 is the time that 99 % of the runs do not exceed."""
        ordered = sorted(seconds)
        count = len(ordered)

        def quantile(share: float) -> float:
            return 1e3 * ordered[min(count - 1, max(0, -int(-share * count // 1) - 1))]

        return cls(quantile(0.5), quantile(0.99), 1e3 * sum(ordered) / count)


def bench(model: Deployed, runs: int, graph: bool = False) -> dict[str, Latency]:
    """Latency of the first reference case: with copies of inputs and outputs, and of the model alone.

    Args:
        model: the model.
        runs: how many of each kind, after a tenth as warm-up.
        graph: launch a CUDA graph for the second kind (TensorRT).
    """
    cases = references(model.folder)
    if not cases:
        raise BundleError("this bundle was made without reference tensors: there are no inputs to measure with")
    feed = model.feed(inputs_of(next(iter(cases.values()))))
    found = {"with copies": _timed(lambda: model.engine.run(feed), runs)}
    engine: Any = model.engine
    if hasattr(engine, "enqueue"):
        if graph:
            executable = engine.cuda.capture(engine.enqueue)
        enqueue = (lambda: engine.cuda.launch(executable)) if graph else engine.enqueue

        def work() -> None:
            enqueue()
            engine.cuda.synchronize()

        found["on the GPU, as a CUDA graph" if graph else "on the GPU"] = _timed(work, runs)
    elif graph:
        raise BundleError(f"{engine.label} has no CUDA graphs")
    return found


def _timed(work: Callable[[], Any], runs: int) -> Latency:
    for _ in range(max(3, runs // 10)):
        work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return Latency.of(times)
