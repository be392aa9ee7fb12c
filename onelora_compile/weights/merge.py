"""Putting vectors into weights: W <- W + b 1ᵀ, with one rounding, and what that rounding lost.

`fold_weight` is the one place where a weight and a vector become one; exporters use it too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapter import refuse_sharded, release, unwrap
from onelora_compile.adapting.adapter_state import adapted_weights, state_of
from onelora_compile.adapting.probe_linear import still_affine
from onelora_compile.adapting.weight_target import Target
from onelora_compile.errors import MergeError
from onelora_compile.kinds import is_plain
from onelora_compile.ops import accumulation_dtype
from onelora_compile.printable import Printable
from onelora_compile.progress import over_weights
from onelora_compile.table import Table, grouped, spread

# The loss is measured in float64, many times as slow as the addition: on all rows of a weight up to this many
# entries, on evenly spaced rows of a larger one.
_MEASURED = 1 << 22


@dataclasses.dataclass(frozen=True)
class FoldLoss:
    """What storing W + b 1ᵀ in the weight's dtype lost.

    Attributes:
        dtype: of the stored weight.
        relative: Frobenius norm of (stored - exact) over that of b 1ᵀ; 0 for a zero vector.
        unchanged: share of the entries that the update should have moved and did not, 0 to 1.

    Measured on a part of a large weight, on evenly spaced rows.
    """

    dtype: torch.dtype
    relative: float
    unchanged: float


@dataclasses.dataclass(frozen=True)
class MergeReport(Printable):
    """What `merge` did, by module name; `print(report)` shows it as a table."""

    losses: dict[str, FoldLoss]

    @property
    def worst(self) -> float:
        """The largest relative loss."""
        return max((loss.relative for loss in self.losses.values()), default=0.0)

    def __rich__(self) -> Table:
        table = Table(title=f"merged {len(self.losses)} vectors")
        for column, justify in (
            ("module", "left"),
            ("dtype", "left"),
            ("lost to rounding", "right"),
            ("unchanged", "right"),
        ):
            table.add_column(column, justify=justify)
        for name, losses in grouped(self.losses.items(), alike=lambda loss: loss.dtype).items():
            lost, still = [loss.relative for loss in losses], [loss.unchanged for loss in losses]
            dtype = str(losses[0].dtype).removeprefix("torch.")
            table.add_row(name, dtype, spread(lost, ".2e"), spread(still, ".1%"))
        return table


def merge(model: nn.Module) -> MergeReport:
    """Put weights W + b 1ᵀ in the places of W and remove the vectors.

    Final. Computed in float32 from the weight as it is (float64 for float64) and rounded once to its dtype. Each
    weight is a new parameter, so that whatever else reads the old one, or its memory, stays the base's: a tied
    embedding, another module, a view, a part of the model outside of `model`. What modules_to_save and train_norms
    trained stays, and so does a mark, see `detach`. All weights are computed before the first gets its place, so a
    failure leaves the model as it was.

    Raises:
        StateError: the model is not adapted or sharded over processes, or a `disabled` block is open.
        MergeError: a weight that is not floating point, a result that its dtype can't hold, or a linear that computes
            something else than W x + c by now.
    """
    root = unwrap(model)
    state = state_of(root, "merge")
    refuse_sharded(root, "merge", "save the adapter, load it into the whole model, and merge there")
    targets = adapted_weights(root)
    folded = {name: _folded(name, target) for name, target in over_weights("merge", targets)}
    with torch.inference_mode(False):
        for name, target in targets.items():
            weight = target.weight
            assert weight is not None
            own = nn.Parameter(folded[name][0], requires_grad=weight.requires_grad)
            vars(own).update(vars(weight))
            target.module._parameters[target.parameter] = own
    release(root, state)
    return MergeReport({name: loss for name, (_, loss) in folded.items()})


def fold_weight(
    weight: Tensor,
    vector: Tensor,
    dims: Sequence[int] = (1,),
    stored_dtype: torch.dtype | None = None,
    measured: int = _MEASURED,
) -> tuple[Tensor, FoldLoss]:
    """W + b 1ᵀ with one rounding, and what it lost.

    Shapes: weight of any layout with input axes `dims`, vector of its other axes: [out_features, in_features] and
    [out_features] by default; the result is a new tensor like weight.
    Dtype: float32 arithmetic (float64 for a float64 weight or vector), stored in `stored_dtype`, the weight's by
    default.  The loss is measured on `measured` entries, in evenly spaced rows.
    Raises: MergeError where the weight is not floating point, or the result overflows its dtype.
    Source: arXiv 2503.08333, section 3.2, merging.
    """
    if not is_plain(weight):
        raise MergeError(
            f"a weight of {type(weight).__name__} in {weight.dtype} can't take the vector without quantising again; "
            "dequantise the base first, or keep the vectors beside it"
        )
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could never be trained
        update = _update(weight.shape, weight, vector, dims)
        stored = (weight.to(update.dtype) + update).to(stored_dtype or weight.dtype)
    if not _finite(stored):
        _check_fits(stored, weight.isfinite())
    rows = slice(None, None, _every(weight.shape, measured))
    return stored, _loss(weight[rows].double(), stored[rows], update[rows])


class FoldByRows:
    """`fold_weight` in place, some rows at a time, for a weight that is folded while it is copied.

    Args:
        shape: of the weight: of those rows and columns of the stored matrix that the vector is for.
        vector: of its axis that is no input axis.
        dims: its input axis.
        first: the row of the stored matrix that is the weight's first.
        columns: of the stored matrix.
        measured: entries on which the loss is measured.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        vector: Tensor,
        dims: Sequence[int] = (1,),
        first: int = 0,
        columns: slice = slice(None),
        measured: int = _MEASURED,
    ) -> None:
        self._shape, self._first, self._columns = shape, first, columns
        self._vector, self._dims = vector.detach(), dims
        self._every = _every(shape, measured)
        self._sampled: list[tuple[Tensor, Tensor, Tensor]] = []  # before, after, and what was added

    def add(self, start: int, rows: Tensor) -> None:
        """Fold into rows of the stored matrix, the first of which is its row `start`.

        Raises: MergeError where the result overflows the weight's dtype.
        """
        begin, end = max(start, self._first), min(start + len(rows), self._first + self._shape[0])
        if begin >= end:
            return
        part = rows[begin - start : end - start, self._columns]
        update = _update(self._shape, part, self._vector, self._dims)[begin - self._first : end - self._first]
        sample = slice(-(begin - self._first) % self._every, None, self._every)
        before, finite = part[sample].double(), None if _finite(part) else part.isfinite()
        if part.dtype == update.dtype:
            part.add_(update)
        else:
            part.copy_(part.to(update.dtype) + update)
        _check_fits(part, finite)
        self._sampled.append((before, part[sample].clone(), update[sample]))

    def loss(self) -> FoldLoss:
        """What rounding lost, once every row is folded."""
        before, after, update = (torch.cat(parts) for parts in zip(*self._sampled, strict=True))
        return _loss(before, after, update)


def _update(shape: Sequence[int], like: Tensor, vector: Tensor, dims: Sequence[int]) -> Tensor:
    """The update b 1ᵀ of a shape, a view, in the dtype of its sum with `like`."""
    dtype = torch.promote_types(accumulation_dtype(like.dtype), accumulation_dtype(vector.dtype))
    update = vector.detach().to(like.device, dtype)
    for dim in sorted(dims):
        update = update.unsqueeze(dim)
    return update.expand(tuple(shape))


def _every(shape: Sequence[int], measured: int) -> int:
    """Each how-manyth row the loss is measured on."""
    return max(1, -(-math.prod(shape) // measured))


def _check_fits(stored: Tensor, finite: Tensor | None) -> None:
    """Whether entries that were finite, all of them for None, still are.

    Raises:
        MergeError: the dtype can't hold one.
    """
    if not _finite(stored) and (finite is None or bool((finite & ~stored.isfinite()).any())):
        raise MergeError(f"W + b 1ᵀ does not fit {stored.dtype}: convert the model to bfloat16 or float32 first")


def _finite(tensor: Tensor) -> bool:
    """Whether all entries are finite: their sum tells in one pass, but for one that overflows by itself."""
    return bool(tensor.sum(dtype=accumulation_dtype(tensor.dtype)).isfinite() or tensor.isfinite().all())


def _loss(weight: Tensor, stored: Tensor, update: Tensor) -> FoldLoss:
    exact = weight + update.double()
    asked = update != 0
    moved, still = asked.sum().item(), (asked & (stored == weight.to(stored.dtype))).sum().item()
    size = update.double().norm().item()  # Frobenius norm of b 1ᵀ
    lost = (stored.double() - exact).norm().item()
    return FoldLoss(stored.dtype, lost / size if size else 0.0, still / moved if moved else 0.0)


def _folded(name: str, target: Target) -> tuple[Tensor, FoldLoss]:
    weight = target.weight
    if target.dims != () and target.parameter in target.module._buffers:
        raise MergeError(
            f"{name!r}: its weight is a buffer and no parameter, as remove_parametrizations leaves a frozen one: take "
            "it out of the module and assign an nn.Parameter in its place"
        )
    if target.dims != () and target.parameter not in target.module._parameters:
        raise MergeError(
            f"{name!r}: its weight is not a parameter but computed from others (a parametrization, weight_norm): "
            "remove that first, for example with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if target.dims is None:
        raise MergeError(f"{name!r}: {output_only(target)}")
    if weight is None:
        raise MergeError(
            f"{name!r}: {type(target.module).__name__} does not keep W as a plain tensor (it is quantised or packed), "
            "so the vector can't go into it; dequantise the base first, or keep the vectors beside it"
        )
    if weight.is_meta:
        raise MergeError(
            f"{name!r}: its weight is not in memory (offloaded by accelerate, or on the meta device), so nothing can "
            "be written to it: load the base without offloading, load the adapter, and merge there"
        )
    if target.called and target.dims and not still_affine(target.module, target.dims):
        raise MergeError(f"{name!r}: {output_only(target)}")
    try:
        return fold_weight(weight.detach(), target.vector, target.dims)
    except MergeError as error:
        raise MergeError(f"{name!r}: {error}") from None


def output_only(target: Target) -> str:
    """Why nothing can be merged into a module whose output alone is adapted."""
    kind = getattr(target.module, "_onelora_base", type(target.module)).__name__
    return (
        f"{kind} computes something else than W x + c (it scales, quantises or activates, or its weight is computed), "
        "so the vector, which adds to its output, can't go into its weight; keep the vectors beside the model (an "
        "adapter file, export with adapters='input' or 'bank'), or leave it out with exclude_modules"
    )
