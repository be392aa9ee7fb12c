"""Putting vectors into the weights of a model, or beside those that are quantised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import require
from onelora_compile.exporters.fold.find_weights import PASSED, Weight, WeightUse
from onelora_compile.exporters.fold.match_fingerprints import Matches
from onelora_compile.exporters.fold.places import Place
from onelora_compile.exporters.fold.redirect import redirect
from onelora_compile.exporters.fold.report import FoldedVector
from onelora_compile.exporters.jetson.device.core.modes import FOLD
from onelora_compile.exporters.onnx_file.load import as_torch, by_rows
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.exporters.onnx_file.overridable import fix
from onelora_compile.exporters.quantized.beside_matmul import Branches, into_zero_points
from onelora_compile.weights.adapter_content import float32
from onelora_compile.weights.adapter_file import AdapterFile
from onelora_compile.weights.merge import FoldByRows, FoldLoss

if TYPE_CHECKING:
    import onnx_ir


_SAME = 1e-6  # distance of a base that is the very same; what is left of it is the rounding of sums in float32


class Folding:
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
        """Leave out vectors of weights that are no base's any more, or can have no branch, with the reason.

        What was folded is told by the metadata where numbers can't tell: those of a quantised weight are the base's
        still, and a small vector is within the tolerance of half precision.
        """
        held = Metadata.from_props(self.model.metadata_props, "the model")
        present = set(held.vectors) if held.traits is FOLD else set()
        for name, places in list(matches.places.items()):
            products = [use.product for place in places for use in place.uses if use.product is not None]
            reasons = [self.branches.why_not(product) for product in products]
            # Trained on what is there, the base is the very same.
            other = bool(products) or max(place.distance for place in places) > _SAME
            if other and {name, f"{name}.weight"} & present:  # a vector, or a head in the place of the weight
                adapters = ", ".join(held.adapters) or "unnamed"
                where = "beside" if products else "in"
                reasons = [f"the model holds a vector {where} that weight already (of {adapters}): fold into the base"]
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
        shared = len(uses) < len(weight.ways) or _is_returned(value) or value.producer() is not None
        name = self.branches.writer.name(f"{weight.name}.{placed[0][0]}.folded") if shared else weight.name
        streamed = _Streamed(lambda: self._folded(weight, source, placed), tuple(source.shape))
        tensor = self.ir.LazyTensor(lambda: streamed, dtype=source.dtype, shape=source.shape, name=name)
        if shared:
            fix(value)
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
            part = slice(place.start, place.start + place.rows)
            vector[part] += place.factor * float32(self.file.vectors[name]).flatten()[place.entries]
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


def _is_returned(value: onnx_ir.Value) -> bool:
    """Whether the file returns a weight, also in another layout: that is the base's, as it is in the adapted model."""
    passed = (use.node for use in value.uses() if use.node.op_type in PASSED)
    return value.is_graph_output() or any(_is_returned(output) for node in passed for output in node.outputs)


def _by_uses(placed: list[tuple[str, Place]]) -> list[tuple[tuple[WeightUse, ...], list[tuple[str, Place]]]]:
    """Vectors of the same uses go into one copy of the weight (q, k and v of a packed one)."""
    groups: dict[tuple[WeightUse, ...], list[tuple[str, Place]]] = {}
    for name, place in placed:
        groups.setdefault(place.uses, []).append((name, place))
    return list(groups.items())
