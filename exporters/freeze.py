"""From a model to an exported program with its vectors where they are wanted: what every exporter starts from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental import _config

from onelora_compile.exporters.axes import Axes, for_export
from onelora_compile.exporters.signature import Call, flat_forward
from onelora_compile.passes.carry_vectors import carry_vectors
from onelora_compile.passes.fold_vectors import FoldResult, fold_vectors

Place = Literal["folded", "weight", "activation"]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A captured program.

    Attributes:
        program: takes the tensors of a call and returns those of its result, both flat.
        folded: what became of the vectors.
        outputs: names of what it returns.
    """

    program: ExportedProgram
    folded: FoldResult
    outputs: list[str]


def freeze(
    model: nn.Module,
    call: Call,
    axes: Sequence[Axes],
    place: Place = "folded",
    originals: Mapping[str, Tensor] | None = None,
    trained: Mapping[str, str] | None = None,
) -> Frozen:
    """Export a plain model in evaluation mode and bring its vectors to their place; the model is not changed.

    Args:
        model: adapted or not.
        call: example inputs.
        axes: dynamic axes of each tensor of the call.
        place: of the vectors: "folded" into the weights, beside each "weight" as `adapted_weight`, or beside each
            "activation" as `add_rank1` of feature sums, one for each input.
        originals: as in `fold_vectors`.
        trained: as in `carry_vectors`, where vectors are carried.
    """
    names: list[str] = []

    def note(found: list[str]) -> None:
        names[:] = found

    with evaluating(model), _any_size(call, axes):
        flat = flat_forward(model, call, note)
        inputs = tuple(call.tensors.values())
        program = torch.export.export(flat, inputs, dynamic_shapes=for_export(axes), strict=False)
    if place == "folded":
        return Frozen(*fold_vectors(program, originals=originals), names)
    return Frozen(*carry_vectors(program, place, trained), names)


def _any_size(call: Call, axes: Sequence[Axes]) -> contextlib.AbstractContextManager[Any]:
    """Let an axis vary whose example has size 1, which torch.export would take for a constant.

    Source: torch/fx/experimental/_config.py, `backed_size_oblivious` (torch 2.11 to 2.13).
    """
    sizes = [tensor.shape[axis] for tensor, each in zip(call.tensors.values(), axes, strict=True) for axis in each]
    if all(size > 1 for size in sizes):
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[Any] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and without compiled calls; every module's own mode is put back."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        # Not for others: under this stance torch.cond, which compiles its branches, is captured with constants.
        eager = torch.compiler.set_stance("force_eager") if _compiled(model) else contextlib.nullcontext()
        with torch.no_grad(), eager:
            yield
    finally:
        for module, mode in training:
            module.training = mode


def _compiled(model: nn.Module) -> bool:
    """Whether a call of the model, or of a part of it, is a compiled one."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
