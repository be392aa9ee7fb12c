"""See to it that what vectors add fits into the ranges of the static quantisers behind them, or say that it may not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onelora_compile.errors import ExportError
from onelora_compile.exporters.quantized.beside_matmul import Branches
from onelora_compile.exporters.quantized.calibration import Seen, check_fits, measure
from onelora_compile.exporters.quantized.saturation import Quantizer, Saturation, Widened, quantizers_behind, refusal
from onelora_compile.exporters.quantized.widen import needed, widen
from onelora_compile.printable import percent, shortened

if TYPE_CHECKING:
    import onnx_ir

ON_SATURATION = ("error", "allow")


def settle_ranges(
    model: onnx_ir.Model,
    changed: Sequence[onnx_ir.Value],
    branches: Branches,
    calibration: Any,
    on_saturation: str,
    external: bool,
) -> Saturation:
    """Measure and widen the ranges behind vectors.

    Args:
        model: with the vectors in it.
        changed: the values that vectors change first.
        branches: that were added.
        calibration: inputs, see `fold_onnx`; None to measure nothing.
        on_saturation: "error" or "allow".
        external: whether the model's weights are in external files.

    Raises:
        ExportError: ranges were calibrated on the base and nothing else is known of them; or one that is too narrow
            can't be widened.
        ConfigError: the inputs do not fit the model.
    """
    found = quantizers_behind(changed, model, branches.constants)
    names = tuple(one.name for one in found)
    open_ones = [one for one in found if one.held is not None and one.node.graph is model.graph]
    if calibration is not None and not open_ones:
        check_fits(calibration, model)  # also where nothing is measured, as a mistake would show in the next model
    if not found or calibration is None:
        if found and on_saturation == "error":
            raise refusal(found)
        return Saturation(names, 0, {}, {})
    hidden = [one for one in found if one not in open_ones]
    if hidden and on_saturation == "error":
        raise _stuck({f"{one.name!r} ({one.fixed})": None for one in hidden})
    if not open_ones:
        return Saturation(names, 0, {}, {})
    seen, inputs = measure(model, open_ones, branches.vectors, calibration, external)
    widened: dict[str, Widened] = {}
    clipping: dict[str, float] = {}
    for quantizer, one in zip(open_ones, seen, strict=True):
        _settle(quantizer, one, branches, widened, clipping)
    if clipping and on_saturation == "error":
        raise _stuck({f"{one.name!r} ({one.fixed})": clipping[one.name] for one in open_ones if one.name in clipping})
    return Saturation(names, inputs, widened, clipping)


def _settle(
    quantizer: Quantizer, seen: Seen, branches: Branches, widened: dict[str, Widened], clipping: dict[str, float]
) -> None:
    held = quantizer.held
    assert held is not None
    ends = needed(quantizer, seen.vectors, seen.plain)
    if ends is None:
        return
    share = seen.beyond / max(1, seen.count)
    if quantizer.fixed:
        clipping[quantizer.name] = share
        return
    widen(quantizer, *ends, branches.writer, branches.constants)
    widened[quantizer.name] = Widened((held.low, held.high), ends, share)


def _stuck(which: dict[str, float | None]) -> ExportError:
    texts = (name if share is None else f"{name}, clips {percent(share)}" for name, share in which.items())
    return ExportError(
        f"{len(which)} ranges behind the vectors were calibrated on the base and can't be widened: "
        f"{shortened(texts, 4)}. Fold before quantising, or on_saturation='allow' to let them clip"
    )
