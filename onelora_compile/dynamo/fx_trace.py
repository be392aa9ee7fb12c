"""Private API of torch.fx: following code so that other threads, and the globals of code, see nothing of it."""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx import _symbolic_trace


@contextlib.contextmanager
def following(functional_call: Callable[..., Any], vmap: Callable[..., Any]) -> Iterator[None]:
    """Inside the block `torch.fx` follows a compiled function as it is written, and leaves the globals of code alone.

    It puts wrappers of `math` into the globals of every module that is called, in any thread, and walks through them
    while other threads change them (`torch/fx/_symbolic_trace.py::_autowrap_check`).

    Args:
        functional_call: stands for `torch.func.functional_call`, which takes no nodes (`torch/nn/utils/stateless.py`);
            given that first, for other threads.
        vmap: the same for what `torch.func.vmap` runs (`torch/_functorch/apis.py`).
    """
    module: Any = torch.fx._symbolic_trace
    stateless: Any = torch.nn.utils.stateless
    apis: Any = torch._functorch.apis
    before = module._autowrap_check, stateless._functional_call, apis.vmap_impl
    module._autowrap_check = lambda *args: None
    stateless._functional_call = functools.partial(functional_call, before[1])
    apis.vmap_impl = functools.partial(vmap, before[2])
    try:
        with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
            yield
    finally:
        module._autowrap_check, stateless._functional_call, apis.vmap_impl = before


# torch.fx's own, which marks the whole process as tracing: then what is compiled raises in every thread.  With a copy
# of its globals it marks nothing.  From 2.14 on it marks its thread alone, and needs no copy.
# Source: torch/fx/_symbolic_trace.py, `_is_fx_tracing_flag` (torch 2.11 to 2.13), `_is_fx_tracing_tls` (from 2.14).
_FLAG = "_is_fx_tracing_flag"
_theirs = fx.Tracer.trace
_trace: Any = types.FunctionType(
    _theirs.__code__,
    dict(vars(_symbolic_trace)) if hasattr(_symbolic_trace, _FLAG) else _theirs.__globals__,
    "trace",
    _theirs.__defaults__,
    _theirs.__closure__,
)


class _InThisThread:
    """True for the thread that makes it."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


def trace_here(tracer: fx.Tracer, root: Any) -> fx.Graph:
    """The graph of the forward of a module, as of `fx.Tracer.trace`; no other thread is taken for tracing."""
    before = getattr(_symbolic_trace, _FLAG, None)
    if before is not None:
        setattr(_symbolic_trace, _FLAG, _InThisThread())
    try:
        graph: fx.Graph = _trace(tracer, root)
        return graph
    finally:
        if before is not None:
            setattr(_symbolic_trace, _FLAG, before)
