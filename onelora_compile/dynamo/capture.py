"""Capturing a call as `torch.compile` does, apart from what the user compiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onelora_compile.dynamo import private_api
from onelora_compile.looking.untouched import Kept


def capture(root: nn.Module, args: Any, kwargs: dict[str, Any], backend: private_api.Compiler) -> None:
    """Run a call of the model once, without gradients, and hand its graphs to `backend`.

    The model, the inputs, the random states, whatever else the forward can reach and Dynamo's caches are as before,
    however often this is called.
    """
    with Kept(root, args, kwargs, tensors=True), torch.no_grad(), private_api.apart(backend) as compiled:
        compiled(root)(*args, **kwargs)
