"""Calling a model as it is deployed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from onelora_compile.dynamo.private_api import in_eager
from onelora_compile.looking.process_flags import no_autocast
from onelora_compile.looking.untouched import Kept


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients, autocast and compiled calls; whatever the model can reach is put back."""
    # Not for others: under this stance torch.cond, which compiles its branches, is captured with constants.
    eager = in_eager() if _compiled(model) else contextlib.nullcontext()
    with Kept(model, tensors=True), torch.no_grad(), no_autocast(), eager:
        model.eval()
        yield


def _compiled(model: nn.Module) -> bool:
    """Whether a call of the model, or of a part of it, is a compiled one."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
