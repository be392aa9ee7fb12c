"""Fold an adapter into any ONNX file of its base, tensor by tensor, without the PyTorch model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError, OneLoRAError, one_of, require
from onelora_compile.exporters.fold.checks import check_places, check_trained, leave_zeros, missing_uses
from onelora_compile.exporters.fold.find_weights import Weight, WeightUse, names_of, weights_of
from onelora_compile.exporters.fold.match_fingerprints import Matches, match_weights
from onelora_compile.exporters.fold.match_trained import match_trained
from onelora_compile.exporters.fold.owners import Known
from onelora_compile.exporters.fold.place_trained import fold_trained
from onelora_compile.exporters.fold.places import Place
from onelora_compile.exporters.fold.redirect import redirect
from onelora_compile.exporters.fold.report import FoldedVector, FoldReport
from onelora_compile.exporters.fold.strip_vectors import strip_vectors
from onelora_compile.exporters.jetson.device.core.modes import FOLD
from onelora_compile.exporters.onnx_file.check import check_opens
from onelora_compile.exporters.onnx_file.load import as_torch, by_rows, load_model
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.exporters.onnx_file.save import bytes_of, save_model
from onelora_compile.exporters.onnx_runtime.one_thread import one_thread
from onelora_compile.exporters.quantized.beside_matmul import Branches, into_zero_points
from onelora_compile.exporters.quantized.pairs import open_operators
from onelora_compile.exporters.quantized.ranges import ON_SATURATION, settle_ranges
from onelora_compile.file_names import as_path
from onelora_compile.progress import counting
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_content import digest, float32
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter
from onelora_compile.weights.atomic_write import refuse_overwriting
from onelora_compile.weights.file_kinds import refuse_other_kinds
from onelora_compile.weights.merge import FoldByRows, FoldLoss

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
            model with this adapter alone.  Into one that holds a folded adapter this one is folded on top.
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
        MergeError: a result that the weight's dtype can't hold.
        AdapterFileError: a damaged adapter file.
        OSError: a file can't be read or written.
    """
    one_of("on_unmatched", on_unmatched, ON_UNMATCHED)
    one_of("on_saturation", on_saturation, ON_SATURATION)
    one_of("on_missing_uses", on_missing_uses, ON_MISSING_USES)
    start = time.perf_counter()
    base, out = as_path(base, "base"), as_path(out, "out")
    file = adapter if isinstance(adapter, AdapterFile) else read_adapter(as_path(adapter, "adapter"))
    file.require_fingerprints("the adapter" if isinstance(adapter, AdapterFile) else adapter)
    model = load_model(base)
    held = Metadata.from_props(model.metadata_props, str(base))
    weights = [value.const_value for value in model.graph.initializers.values() if _external(value)]
    read = [] if isinstance(adapter, AdapterFile) else [adapter]
    refuse_overwriting(out, [*read, *(path for one in weights if (path := getattr(one, "path", None)))])
    refuse_other_kinds(out, ".onnx")
    try:
        strip_vectors(model, held, str(base))
        external = any(_external(value) for value in model.graph.initializers.values())
        with counting(f"fold {base.name}", progress) as count, one_thread():
            _prepare(model)
            folder = _Folder(model, file)
            known = Known(file.config, frozenset(names_of(model)), file.uses)
            matches = match_weights(count.over("find the weights", weights_of(model)), file.fingerprints, known)
            folder.refuse(matches)
            zeros = leave_zeros(matches, file)
            check_places(matches, file, base, on_unmatched, model.metadata_props)
            missing = missing_uses(matches, file, base, on_missing_uses)
            named = ((name, use) for name, places in matches.places.items() for one in places for use in one.uses)
            trained = match_trained(model, file, named, held)
            check_trained(trained, base, on_unmatched)
            for weight, placed in folder.by_weight(matches):
                folder.fold(weight, placed)
            fold_trained(model, trained, file.saved)
            ops = [read.use.op for reads in trained.reads.values() for read in reads]
            ops += [op for dropped in trained.dropped.values() for op in dropped]
            changed = [*folder.changed, *folder.branches.totals, *(output for op in ops for output in op.outputs)]
            saturation = settle_ranges(model, changed, folder.branches, calibration, on_saturation, external)
            name = "" if isinstance(adapter, AdapterFile) else Path(adapter).name.removesuffix(".safetensors")
            put = [*folder.done, *trained.reads, *trained.dropped]
            model.metadata_props.update(_metadata(model, base, file, put, name, held).to_props())
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


class _Folder:
    """Changes a model; what is folded is computed when it is written."""

    def __init__(self, model: onnx_ir.Model, file: AdapterFile) -> None:
        self.ir: Any = require("onnx_ir", "onnx", "fold into an ONNX model")
        self.model = model
        self.file = file
        self.branches = Branches(model)
        self.changed: list[onnx_ir.Value] = []  # outputs of ops whose weights are folded
        self.done: dict[str, list[str]] = {}
        self.how: dict[str, str] = {}
        self.losses: dict[str, FoldLoss] = {}

    def refuse(self, matches: Matches) -> None:
        """Leave out vectors of quantised weights beside which no branch can stand, or one stands, with the reason."""
        held = Metadata.from_props(self.model.metadata_props, "the model")
        present = set(held.vectors) if held.traits is FOLD else set()
        for name, places in list(matches.places.items()):
            products = [use.product for place in places for use in place.uses if use.product is not None]
            reasons = [self.branches.why_not(product) for product in products]
            if products and name in present:  # the quantised numbers are the base's still, so they tell nothing
                adapters = ", ".join(held.adapters) or "unnamed"
                reasons = [f"the model holds a vector beside that weight already (of {adapters}): fold into the base"]
            if reason := next((one for one in reasons if one is not None), None):
                matches.unmatched[name] = reason
                del matches.places[name]

    def by_weight(self, matches: Matches) -> list[tuple[Weight, list[tuple[str, Place]]]]:
        """What goes into each weight."""
        groups: dict[int, tuple[Weight, list[tuple[str, Place]]]] = {}
        for name, places in matches.places.items():
            for place in places:
                groups.setdefault(id(place.weight), (place.weight, []))[1].append((name, place))
        return list(groups.values())

    def fold(self, weight: Weight, placed: list[tuple[str, Place]]) -> None:
        """Fold all vectors of one weight."""
        for uses, own in _by_uses(placed):
            if weight.quantized:
                self._beside(weight, uses, own)
            else:
                self._into(weight, uses, own)
            for name, _ in own:
                self.done.setdefault(name, []).append(weight.name)

    def report(self) -> dict[str, FoldedVector]:
        """Where each vector went; complete once the model is written."""
        return {
            name: FoldedVector(tuple(where), self.how.get(name, "weight"), self.losses.get(name))
            for name, where in self.done.items()
        }

    def _into(self, weight: Weight, uses: Sequence[WeightUse], placed: list[tuple[str, Place]]) -> None:
        self.changed += [output for use in uses for output in use.op.outputs]
        value = weight.value
        # What ops compute is taken now: they are removed when nothing else reads them.
        source: Any = weight.tensor if weight.computed is None else self.ir.tensor(weight.computed.numpy())
        shared = len(uses) < len(weight.ways) or value.is_graph_output() or value.producer() is not None
        name = self.branches.writer.name(f"{weight.name}.{placed[0][0]}.folded") if shared else weight.name
        streamed = _Streamed(lambda: self._folded(weight, source, placed), tuple(source.shape))
        tensor = self.ir.LazyTensor(lambda: streamed, dtype=source.dtype, shape=source.shape, name=name)
        if shared:
            redirect(self.branches.writer, self.model.graph, uses, tensor)
        else:
            value.const_value = tensor

    def _folded(self, weight: Weight, source: Any, placed: list[tuple[str, Place]]) -> Iterator[np.ndarray]:
        """The rows of a folded weight, some at a time."""
        folds = {vector: self._by_rows(vector, place) for vector, place in placed}
        for start, part in by_rows(source, weight.shape):
            rows = as_torch(part)
            for fold in folds.values():
                fold.add(start, rows)
            yield part
        for vector, fold in folds.items():  # of a weight in parts the worst
            losses = [fold.loss(), *([self.losses[vector]] if vector in self.losses else [])]
            self.losses[vector] = max(losses, key=lambda loss: loss.relative)

    def _by_rows(self, vector: str, place: Place) -> FoldByRows:
        values = self.file.vectors[vector].flatten()[place.entries] * place.factor
        columns = place.base[1]
        if place.transposed:
            part = slice(place.start, place.start + place.rows)
            return FoldByRows((columns, place.rows), values, (0,), columns=part, measured=_MEASURED)
        return FoldByRows((place.rows, columns), values, (1,), first=place.start, measured=_MEASURED)

    def _beside(self, weight: Weight, uses: Sequence[WeightUse], placed: list[tuple[str, Place]]) -> None:
        """Put vectors beside the products of a quantised weight, or into its zero points if these can hold them."""
        turned = placed[0][1].transposed
        vector = np.zeros(weight.shape[1] if turned else weight.shape[0], dtype=np.float32)
        for name, place in placed:
            vector[place.start : place.start + place.rows] += (
                place.factor * float32(self.file.vectors[name]).flatten()[place.entries]
            )
        alone = len(weight.uses) == len(uses) == 1 and not turned
        how = "zero points" if alone and into_zero_points(uses[0].op, vector, self.ir) else "branch"
        if how == "zero points":
            self.changed += uses[0].op.outputs
        else:
            for use in uses:
                assert use.product is not None
                self.branches.add(use.product, vector, f"{placed[0][0]}.vector", across=turned != use.across)
        self.how |= dict.fromkeys((name for name, _ in placed), how)


# Entries of a weight on which the rounding is measured: the report must not cost more than the fold.
_MEASURED = 1 << 16


class _Streamed:
    """A tensor whose numbers are computed as they are written: what onnx_ir asks of a LazyTensor's content."""

    def __init__(self, parts: Callable[[], Iterator[np.ndarray]], shape: tuple[int, ...]) -> None:
        self._parts, self._shape = parts, shape

    def tofile(self, file: Any) -> None:
        for part in self._parts():
            file.write(part.reshape(-1).view(np.uint8).data)
        if hasattr(os, "posix_fadvise"):
            # Linux begins to write to the disk now, beside the work on the next tensor, and not at the end.
            file.flush()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def numpy(self) -> np.ndarray:
        # Copies: a part is overwritten by the next one.
        return np.concatenate([part.copy() for part in self._parts()]).reshape(self._shape)

    def tobytes(self) -> bytes:
        return self.numpy().tobytes()

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return self.numpy().astype(dtype) if dtype is not None else self.numpy()


def _by_uses(placed: list[tuple[str, Place]]) -> list[tuple[tuple[WeightUse, ...], list[tuple[str, Place]]]]:
    """Vectors of the same uses go into one copy of the weight (q, k and v of a packed one)."""
    groups: dict[tuple[WeightUse, ...], list[tuple[str, Place]]] = {}
    for name, place in placed:
        groups.setdefault(place.uses, []).append((name, place))
    return list(groups.items())


def _own(error: BaseException | None) -> OneLoRAError | None:
    """This package's error among the causes of one."""
    while error is not None and not isinstance(error, OneLoRAError):
        error = error.__cause__
    return error


def _external(value: onnx_ir.Value) -> bool:
    return hasattr(value.const_value, "location")
