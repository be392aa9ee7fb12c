"""Capturing a call as `torch.compile` does, apart from what the user compiles.

Dynamo keeps its graphs on the code objects of functions, a limited number for each, and remembers sizes that changed.
So what is captured only to be looked at must neither count there, nor throw away the user's graphs.

Private API, as in torch/_dynamo/eval_frame.py and convert_frame.py of torch 2.11 to 2.15.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn
from torch._C._dynamo import eval_frame
from torch._dynamo import pgo
from torch._dynamo.symbolic_convert import InstructionTranslator

from onelora_compile.untouched import Kept

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
_MANY = 1_000_000
# From torch 2.13 on.
_OWN_REGION = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


def capture(root: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], backend: Backend) -> None:
    """Run a call of the model once, without gradients, and hand its graphs to `backend`.

    The model, the inputs, the random states, whatever else the forward can reach and Dynamo's caches are as before,
    however often this is called.
    """
    fresh: list[CodeType] = []

    def noting(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        code = InstructionTranslator.current_tx().output.root_tx.f_code
        if not _entries(code):
            fresh.append(code)
        return backend(gm, example_inputs)

    alone = torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=_MANY, accumulated_recompile_limit=_MANY
    )
    # Which sizes changed from call to call, by code.
    sizes = pgo.get_code_state()
    before = copy.deepcopy(dict(sizes))
    try:
        with Kept(root, args, kwargs, tensors=True), alone, torch.compiler.set_stance("default"), torch.no_grad():
            torch.compile(root, backend=noting, **_OWN_REGION)(*args, **kwargs)  # type: ignore[call-overload]
    finally:
        for code in fresh:  # the user has compiled none of these
            eval_frame.reset_code(code)
        sizes.clear()
        sizes.update(before)


def _entries(code: CodeType) -> int:
    """How many graphs Dynamo keeps for a code object."""
    if _OWN_REGION:
        return int(eval_frame._get_total_cache_entry_count(code))
    return len(eval_frame._debug_get_cache_entry_list(code))
