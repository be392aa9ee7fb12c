"""From a model to an exported program with its vectors where they are wanted: what every exporter starts from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from onelora_compile.passes.carry_vectors import carry_vectors
from onelora_compile.passes.fold_vectors import FoldResult, fold_vectors

Place = Literal["folded", "weight", "activation"]


def freeze(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    place: Place = "folded",
    originals: Mapping[str, Tensor] | None = None,
    trained: Mapping[str, str] | None = None,
) -> tuple[ExportedProgram, FoldResult]:
    """Export a plain model in evaluation mode and bring its vectors to their place; the model is not changed.

    Args:
        model: adapted or not.
        args: example inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: as in `torch.export.export`; a dimension may also be a name, as in `torch.onnx.export`.
        place: of the vectors: "folded" into the weights, beside each "weight" as `adapted_weight`, or beside each
            "activation" as `add_rank1` of feature sums, one for each input.
        originals: as in `fold_vectors`.
        trained: as in `carry_vectors`, where vectors are carried.
    """
    dynamic_shapes = _dims(dynamic_shapes)
    with evaluating(model):
        program = torch.export.export(
            model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
        )
    return fold_vectors(program, originals=originals) if place == "folded" else carry_vectors(program, place, trained)


def _dims(shapes: Any) -> Any:
    """Named dimensions as dynamic ones; torch.export finds out which of them are equal."""
    if isinstance(shapes, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(shapes, Mapping):
        return {key: _dims(value) for key, value in shapes.items()}
    if isinstance(shapes, (tuple, list)):
        return type(shapes)(_dims(value) for value in shapes)
    return shapes


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
