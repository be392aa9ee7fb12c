"""Capturing a call as `torch.compile` does, apart from what the user compiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onelora_compile import inductor
from onelora_compile.untouched import Kept


def capture(root: nn.Module, args: Any, kwargs: dict[str, Any], backend: inductor.Compiler) -> None:
    """Run a call of the model once, without gradients, and hand its graphs to `backend`.

    The model, the inputs, the random states, whatever else the forward can reach and Dynamo's caches are as before,
    however often this is called.
    """
    with Kept(root, args, kwargs, tensors=True), torch.no_grad(), inductor.apart(backend) as compiled:
        compiled(root)(*args, **kwargs)
