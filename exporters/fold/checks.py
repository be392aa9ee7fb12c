"""What was found in a file against what the adapter holds: nothing is left out without a word."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from onelora_compile.errors import BaseMismatchError, ExportError
from onelora_compile.exporters.fold.match_fingerprints import Matches
from onelora_compile.exporters.fold.parameter_reads import TrainedPlaces
from onelora_compile.exporters.jetson.device.core.modes import FOLD
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.exporters.quantized.products import unread_ops
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_file import AdapterFile

if TYPE_CHECKING:
    import onnx_ir

_MANY = (
    " (of experts or heads, of which only weights of two axes are looked for: export the adapted model by export_onnx)"
)
_RELATED = 0.9  # relative distance: that of two weights which have nothing to do with each other is 1.0 to 1.4
_SCALED = (
    ". They are related: weights that were trained further differ so, and those whose columns were scaled "
    "(SmoothQuant, AWQ), where the feature sum is another; then fold first, and scale and quantise after it"
)
NOTHING = "its vector is zero, so there is nothing to fold"


def leave_zeros(matches: Matches, file: AdapterFile) -> dict[str, str]:
    """Take vectors of zeros off those without a place: the file is their function as it is.

    A layer that no forward uses is in no exported file, and training leaves its vector at zero.

    Returns:
        Which, with the reason; none where no vector has a place, since then it may be another base.
    """
    zeros = [name for name in matches.unmatched if not file.vectors[name].any()] if matches.places else []
    for name in zeros:
        del matches.unmatched[name]
    return dict.fromkeys(zeros, NOTHING)


def check_places(matches: Matches, file: AdapterFile, base: Path, on_unmatched: str, model: onnx_ir.Model) -> None:
    """Whether every vector has a place.

    Raises:
        BaseMismatchError: the file is another base's.
        ExportError: vectors have none, and may not be left out.
    """
    if matches.unmatched and not matches.places and set(matches.unmatched) <= set(matches.nearest):
        worst = ", ".join(f"{name} (differs by {matches.nearest[name]:.1%})" for name in list(matches.unmatched)[:5])
        held = Metadata.from_props(model.metadata_props, str(base))
        hint = f". It holds an adapter already ({', '.join(held.adapters) or 'unnamed'})" if held.traits is FOLD else ""
        if median(matches.nearest[name] for name in matches.unmatched) < _RELATED:
            hint += _SCALED
        raise BaseMismatchError(f"{base} is not the base of the adapter: none of its weights is; {worst}{hint}")
    if matches.unmatched and (on_unmatched == "error" or not matches.places):
        many = {name: _MANY for name in matches.unmatched if file.vectors[name].ndim > 1}
        listed = "; ".join(f"{name}: {why}{many.get(name, '')}" for name, why in list(matches.unmatched.items())[:8])
        free = shortened((f"{one.name} {list(one.shape)} {one.dtype}" for one in matches.free), 12)
        packed = f". Not read are the weights of {', '.join(unread)}" if (unread := unread_ops(model)) else ""
        raise ExportError(
            f"{len(matches.unmatched)} of {len(file.vectors)} vectors have no place in {base}: {listed}. Weights of "
            f"the model that no vector took: {free}{packed}. Nothing was written; on_unmatched='skip' folds the "
            "others, as where the file leaves out layers that its tool saw no use of"
        )


def missing_uses(matches: Matches, file: AdapterFile, base: Path, on_missing_uses: str) -> dict[str, tuple[int, int]]:
    """The vectors whose weight the file uses less often than the model may: how often there, and in the model.

    Raises:
        ExportError: less often than the model does whatever its arguments are, or nobody can tell.
    """
    uses = {name: times for name, times in file.uses.items() if name in matches.places and file.vectors[name].any()}
    unsure = [name for name, (_, most) in uses.items() if not most]
    if unsure and on_missing_uses == "error":
        raise ExportError(
            f"the uses of {shortened(unsure, 8)} can't be counted: the model has more of them where its inputs are "
            "longer, and one is on constants alone; or it takes a derivative, whose tangents may be constants; or it "
            f"reads the weight, which an embedding shares. {base} does not tell which numbers depend on the weight, or "
            "which uses to adapt. Nothing was written; export the adapted model itself, or on_missing_uses='allow' for "
            "a file that was written without constant folding"
        )
    found = {name: sum(len(place.uses) for place in places) for name, places in matches.places.items()}
    fewer = {name: (found[name], abs(most)) for name, (_, most) in uses.items() if found[name] < abs(most)}
    sure = {name: times for name, times in fewer.items() if times[0] < uses[name][0]}
    if sure and on_missing_uses == "error":
        listed = shortened([f"{name!r} {there} of {times}" for name, (there, times) in sure.items()], 8)
        raise ExportError(
            f"{base} has fewer uses of some weights than one forward of the model: {listed}. The tool that wrote it "
            "may have computed the others from constants, where the base's numbers would stay. Nothing was written; "
            "export the adapted model itself, or the base without constant folding; or on_missing_uses='allow', if the "
            "file leaves out the part of the model that uses them again"
        )
    return fewer


def check_trained(places: TrainedPlaces, base: Path, on_unmatched: str) -> None:
    """Whether what else was trained has a place.

    Raises:
        ExportError: not all of it, and it may not be left out.
    """
    if places.missing and on_unmatched == "error":
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(places.missing.items())[:8])
        raise ExportError(
            f"the adapter also trained {shortened(places.missing)} (modules_to_save, train_norms), which have no place "
            f"in {base}: {listed}. Nothing was written; load the adapter into the PyTorch model and export that, or "
            "on_unmatched='skip' folds the others"
        )
