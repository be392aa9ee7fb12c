"""Where an engine's values go wrong: an engine of the same model whose inner values are outputs as well.

Which values these are was chosen when the bundle was made, with the largest magnitude of each on the reference inputs.
Outputs end fusions, so what is wrong because of a fusion may be right here; then that is what is told.
"""

from __future__ import annotations

from typing import Any

from .adapters import vectors_of
from .deployed import Deployed
from .folder import BundleError
from .measure import inputs_of, references, wrong
from .tensors import Tensor

_LARGER = 2.0  # times the largest magnitude at packing


def find_start(model: Deployed) -> list[str]:
    """Build that engine, run the reference inputs with the adapter in use, and tell the first value that is wrong.

    Raises:
        BundleError: not for this runtime, or of a bundle that knows no inner values.
    """
    values: list[dict[str, Any]] = model.folder.manifest["model"].get("values") or []
    if model.options.runtime == "onnxruntime":
        raise BundleError("--layers builds an engine: it is for --runtime tensorrt")
    if not values:
        raise BundleError("this bundle knows no inner values: only those with float16 and reference tensors do")
    engine = _watching(model, [one["name"] for one in values])
    before, seen = "", 0
    for case, tensors in references(model.folder).items():
        outputs = engine.run(model.feed(inputs_of(tensors)))
        for one in [one for one in values if one["name"] in outputs]:
            if reason := _reason(outputs[one["name"]], one):
                first = f"; the value before it, {before}, is right" if before else ""
                return [f"case {case}: starts at {one['name']} ({one['op']}): {reason}{first}"]
            before, seen = f"{one['name']} ({one['op']})", seen + 1
        before = ""
    return [
        f"all {seen} inner values are right in an engine that has them as outputs: what is wrong comes of fusing "
        "layers. Make the bundle for this release, or try --optimization-level 0"
    ]


def _watching(model: Deployed, names: list[str]) -> Any:
    from .trt_build import build
    from .trt_run import TensorRT

    build(model.folder, model.options, model.adapter, watch=names)
    engine = TensorRT(model.folder, model.options, model.adapter, names)
    if model.folder.traits.takes_files:
        engine.set_vectors(vectors_of(model.folder, model.adapter))
    return engine


def _reason(found: Tensor, known: dict[str, Any]) -> str:
    """Why a value is wrong, "" if it is not."""
    if not known["finite"]:  # it holds infinities on purpose, as masks do
        return ""
    if text := wrong(found):
        return text
    largest = max(map(abs, found.values()), default=0.0)
    if largest > _LARGER * known["largest"]:
        return f"up to {largest:.3g}, at packing {known['largest']:.3g}"
    return ""
