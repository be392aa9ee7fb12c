"""Fold an adapter into any ONNX file of its base, tensor by tensor, without the PyTorch model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError, OneLoRAError, one_of, require
from onelora_compile.exporters.fold.checks import check_places, check_trained, leave_zeros, missing_uses
from onelora_compile.exporters.fold.find_weights import names_of, weights_of
from onelora_compile.exporters.fold.match_fingerprints import match_weights
from onelora_compile.exporters.fold.match_trained import match_trained
from onelora_compile.exporters.fold.often import bodies_of
from onelora_compile.exporters.fold.one_thread import one_thread
from onelora_compile.exporters.fold.owners import Known
from onelora_compile.exporters.fold.place_trained import fold_trained
from onelora_compile.exporters.fold.put_vectors import Folding
from onelora_compile.exporters.fold.report import FoldReport
from onelora_compile.exporters.fold.strip_vectors import strip_vectors
from onelora_compile.exporters.jetson.device.core.modes import FOLD
from onelora_compile.exporters.onnx_file.check import check_opens
from onelora_compile.exporters.onnx_file.load import files_of, load_model
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.exporters.onnx_file.overridable import overridable
from onelora_compile.exporters.onnx_file.save import bytes_of, save_model
from onelora_compile.exporters.quantized.pairs import open_operators
from onelora_compile.exporters.quantized.ranges import ON_SATURATION, settle_ranges
from onelora_compile.file_names import as_file, as_path
from onelora_compile.looking.process_flags import no_autocast
from onelora_compile.progress import counting
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_content import digest, float32
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter
from onelora_compile.weights.atomic_write import refuse_overwriting
from onelora_compile.weights.file_kinds import refuse_other_kinds

if TYPE_CHECKING:
    import onnx_ir

ON_UNMATCHED = ("error", "skip")
ON_MISSING_USES = ("error", "allow")


def fold_onnx(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | AdapterFile,
    out: str | os.PathLike[str],
    on_unmatched: str = "error",
    progress: bool = True,
    calibration: Any = None,
    on_saturation: str = "error",
    on_missing_uses: str = "error",
) -> FoldReport:
    """Put the vectors of an adapter into an ONNX model of its base, whatever tool wrote or changed that.

    Each weight is found by its fingerprint, not by its name: it may be renamed, transposed, packed with others, scaled,
    copied, shared, or stored in half precision.  W + b 1ᵀ is computed in float32 and rounded once.  A quantised weight
    stays as it is: its vector goes into floating zero points, or beside the matmul as sum(x) * b.  A weight that
    another op needs too (a tied embedding) is copied for the adapted use.  If it fails, nothing was written, and an old
    file at `out` is as it was.

    Activations that are quantised with fixed ranges clip to what they were in the base.  Updates are added behind such
    quantisers where that is the same; what comes after may still leave its range, which only data can tell.

    A tool may have computed what a weight gives with constants, so that a use of the weight is a number of the file:
    there the base stays.  The adapter file knows how often the model uses a weight, and a file with fewer uses is
    refused.  Where it depends on the arguments that the model was called with, the report says how many are missing.

    Args:
        base: the model; its weights may be in external files beside it.  It is not changed, unless it is `out` too.  Of
            an export that carries vectors (modes "load", "input", "bank") the base is taken: what is written is a plain
            model with this adapter alone.  One that holds a folded adapter takes another of other layers; of the
            same layers it is no base any more, and refused.
        adapter: an adapter file, or one that was read.
        out: the file to write, replaced in one step, a link too; weights go into `<out>.data` if the base has such.
        on_unmatched: "error", or "skip" to leave out vectors without a place, which the report then names. One of zeros
            is left out in any case: training leaves it so on a layer that no forward uses, and no file holds that.
        calibration: inputs of the model, to measure those ranges and widen the ones that are too narrow: arrays by
            name, or in the inputs' order; one such input, several, or a CalibrationDataReader of ONNX Runtime.
        on_saturation: "error", or "allow" to leave ranges that are unknown, or can't be widened, as they are.
        on_missing_uses: "error", or "allow" for a file that leaves out a part of the model which uses a weight again.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        BaseMismatchError: the model is not the adapter's base.
        ExportError: vectors have no place, or uses of their weights are missing, which the message names; ranges may
            clip them; or not an ONNX model, or a damaged one.
        ConfigError: `out` is the adapter, or weights of the base; an option that is not one, or calibration inputs
            that do not fit the model.
        MergeError: a result, or a trained value, that the file's dtype can't hold.
        AdapterFileError: a damaged adapter file.
        OSError: a file can't be read or written.
    """
    one_of("on_unmatched", on_unmatched, ON_UNMATCHED)
    one_of("on_saturation", on_saturation, ON_SATURATION)
    one_of("on_missing_uses", on_missing_uses, ON_MISSING_USES)
    start = time.perf_counter()
    base, out = as_path(base, "base"), as_file(out, "out")
    file = adapter if isinstance(adapter, AdapterFile) else read_adapter(as_path(adapter, "adapter"))
    file.require_fingerprints("the adapter" if isinstance(adapter, AdapterFile) else adapter)
    model = load_model(base)
    held = Metadata.from_props(model.metadata_props, str(base))
    read = [] if isinstance(adapter, AdapterFile) else [adapter]
    refuse_overwriting(out, [*read, *files_of(model)])
    refuse_other_kinds(out, ".onnx")
    try:
        strip_vectors(model, held, str(base))
        given = overridable(model)
        external = any(_external(value) for value in model.graph.initializers.values())
        with counting(f"fold {base.name}", progress) as count, one_thread(), no_autocast():
            _prepare(model)
            folder = Folding(model, file)
            known = Known(file.config, frozenset(names_of(model)), file.uses, bodies_of(model))
            matches = match_weights(count.over("find the weights", weights_of(model)), file.fingerprints, known)
            folder.refuse(matches)
            zeros = leave_zeros(matches, file)
            check_places(matches, file, base, on_unmatched, model)
            missing = missing_uses(matches, file, base, on_missing_uses)
            named = ((name, use) for name, places in matches.places.items() for one in places for use in one.uses)
            trained = match_trained(model, file, named, held)
            check_trained(trained, base, on_unmatched)
            for weight, placed in folder.by_weight(matches):
                folder.fold(weight, placed)
            fold_trained(model, trained, file.saved)
            ops = [read.use.op for reads in trained.reads.values() for read in reads]
            ops += [read.use.op for dropped in trained.dropped.values() for read, _ in dropped]
            changed = [*folder.changed, *folder.branches.totals, *(output for op in ops for output in op.outputs)]
            saturation = settle_ranges(model, changed, folder.branches, calibration, on_saturation, external)
            name = "" if isinstance(adapter, AdapterFile) else Path(adapter).name.removesuffix(".safetensors")
            put = [*folder.done, *trained.reads, *trained.dropped]
            model.metadata_props.update(_metadata(model, base, file, put, name, held).to_props())
            fixed = sorted(given - overridable(model))
            count.start("write", len(model.graph.initializers))
            files = save_model(
                model, out, external or None, check=lambda beside: check_opens(beside, base), written=count.step
            )
    except (OneLoRAError, OSError):
        raise
    except Exception as error:  # a foreign model may break any expectation, of ours and of onnx_ir
        if own := _own(error):  # raised while a tensor was written, and wrapped by onnx_ir
            raise own from None
        raise ExportError(f"{base} is damaged, or laid out in a way that can't be followed: {error!r}") from error
    return FoldReport(
        files=files,
        bytes=bytes_of(files),
        folded=folder.report(),
        skipped=zeros | matches.unmatched | trained.missing,
        replaced=[name for name in file.saved if name in trained.reads or name in trained.dropped],
        saturation=saturation,
        missing_uses=missing,
        fixed=fixed,
        seconds=time.perf_counter() - start,
    )


def _prepare(model: onnx_ir.Model) -> None:
    """Bring a model into a form in which every product stands in a graph, with a floating output."""
    if model.functions:
        passes: Any = require("onnx_ir.passes.common", "onnx", "fold into an ONNX model")
        passes.InlinePass()(model)
    open_operators(model)


def _metadata(
    model: onnx_ir.Model, base: Path, file: AdapterFile, put: Iterable[str], name: str, before: Metadata
) -> Metadata:
    """What the folded model says; a model that was folded before goes on to say so."""
    values = {one: float32(file.tensors[one]) for one in put}
    folded = before if before.traits is FOLD else Metadata()
    names: tuple[str, ...] = (name,) if name else ()
    if folded.traits is FOLD:
        names = (*(folded.adapters or ("unnamed",)), name or "unnamed")
    return Metadata(
        mode="fold",
        vectors={**folded.vectors, **{one: value.shape for one, value in values.items()}},
        fingerprints={**folded.fingerprints, **{one: file.fingerprints[one] for one in values if one in file.vectors}},
        adapters=names,
        sha256=digest(values) if not folded.sha256 else digest({**values, folded.sha256: np.zeros(0)}),
        producer=f"onelora-compile {__version__}, from {base.name} by {model.producer_name or 'an unknown tool'}",
    )


def _own(error: BaseException | None) -> OneLoRAError | None:
    """This package's error among the causes of one."""
    while error is not None and not isinstance(error, OneLoRAError):
        error = error.__cause__
    return error


def _external(value: onnx_ir.Value) -> bool:
    return hasattr(value.const_value, "location")
