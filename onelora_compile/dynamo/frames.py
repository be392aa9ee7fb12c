"""The frame that Dynamo is compiling: which modules it reaches, and for which of them its graph is valid.

Read in torch 2.11 to 2.13:
- `torch/_dynamo/source.py`: a source is the expression by which the frame reaches a value.
- `torch/_dynamo/guards.py`: guards are built after the backend returns, from the values as they are then.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import fx, nn

from onelora_compile.errors import StateError

_TOKEN = "_onelora_first_call"  # attribute of a module
_ENTRY = "compile_wrapper"  # what a call of anything compiled begins with: torch/_dynamo/eval_frame.py


def frame_roots(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[nn.Module, Any]:
    """The outermost modules that the frame being compiled reaches the graph's parameters through, with sources.

    Empty for a graph that does not come from Dynamo.
    """
    if (frame := _frame()) is None:
        return {}
    scope = {"L": frame.f_locals, "G": frame.f_globals}
    roots: dict[nn.Module, Any] = {}
    inputs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
    given = [(getattr(node, "_dynamo_source", None), value) for node, value in inputs]
    for read in [source for source, value in [*given, *_held(gm)] if isinstance(value, nn.Parameter)]:
        for source in reversed(list(_bases(read))):
            module = _value(source, frame.f_globals, scope)
            if isinstance(module, nn.Module):
                roots.setdefault(module, source)
                break
    return roots


def _held(gm: fx.GraphModule) -> list[tuple[Any, Any]]:
    """What Dynamo left in the graph's module, where Inductor is to freeze it, with sources."""
    sources = getattr(gm, "_param_name_to_source", None) or {}
    names = [str(node.target) for node in gm.graph.find_nodes(op="get_attr")]
    return [(sources.get(name), getattr(gm, name, None)) for name in names]


def is_ahead_of_time(gm: fx.GraphModule) -> bool:
    """Whether Dynamo captured the graph and has left its frame: `torch/_dynamo/aot_compile.py`."""
    inputs = gm.graph.find_nodes(op="placeholder")
    return _frame() is None and any(hasattr(node, "_dynamo_source") for node in inputs)


def _frame() -> Any:
    """Dynamo's translator of the frame that is being compiled; None outside of any."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None


def is_part_of_a_call() -> bool:
    """Whether the frame that is being compiled is not the one that the user's call of what is compiled began with.

    After a graph break Dynamo compiles what is left of a frame, or the frames that it calls, one by one.
    """
    from torch._dynamo import convert_frame

    tx = _frame()
    if tx is not None and tx.f_code.co_name.startswith("torch_dynamo_resume_in_"):
        return True
    between: list[str] = []  # the call and Dynamo
    for frame in callers():
        if frame.f_code.co_name == _ENTRY:
            return any(file != nn.modules.module.__file__ for file in between)
        if (file := frame.f_code.co_filename) == convert_frame.__file__:
            between.clear()
        else:
            between.append(file)
    return False


def compiled_module(module: nn.Module) -> nn.Module:
    """The module that the user gave to `torch.compile`, or that the function given to it calls; `module` is in it.

    After a graph break Dynamo compiles the frames of inner modules one by one; the frames that called them are
    still on Python's stack.
    """
    outermost, inside = module, True
    for frame in callers():
        if frame.f_code.co_name == _ENTRY:
            inside = False
        called = frame.f_locals.get("self") if frame.f_code.co_name in ("__call__", "_wrapped_call_impl") else None
        if not isinstance(called, nn.Module):
            continue
        inner = called._modules.get("_orig_mod")
        if inner is None and getattr(called, "_compiled_call_impl", None) is not None:
            inner = called
        if inner is not None and any(part is module for part in inner.modules()):
            return inner
        if inside and any(part is module for part in called.modules()):
            outermost = called
    return outermost


class FirstCallToken:
    """Lies in a module as long as a graph that may run once is valid."""


def valid_once(sources: Mapping[nn.Module, Any]) -> Callable[[], None]:
    """Make the graph that is being compiled valid for these very modules, until the function returned is called.

    Args:
        sources: modules that the frame reaches, with their sources.
    """
    for root, source in sources.items():
        vars(root).setdefault(_TOKEN, FirstCallToken())
        guard_identity(own_attribute(source, _TOKEN))
    roots = [weakref.ref(root) for root in sources]

    def withdraw() -> None:
        for ref in roots:
            if (root := ref()) is not None:
                vars(root).pop(_TOKEN, None)

    return withdraw


def valid_without(source: Any, attribute: str) -> Callable[[], nn.Module] | None:
    """Make the graph that is being compiled valid for any module in this place that lacks an attribute.

    Returns:
        What finds the module that the graph is called for, from inside that call; None if it is not an argument or a
        free variable of the frame, and nothing was done.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import LocalSource
    from torch._dynamo.symbolic_convert import InstructionTranslator

    if not isinstance(source, LocalSource):
        return None
    absent = functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=attribute)
    install_guard(source.make_guard(absent))
    code = InstructionTranslator.current_tx().output.root_tx.f_code
    captured, name = (code.co_filename, code.co_firstlineno, code.co_name), source.local_name

    def find() -> nn.Module:
        # Dynamo's code of the frame has the name and the arguments of the user's.
        for frame in callers():
            code = frame.f_code
            if (code.co_filename, code.co_firstlineno, code.co_name) == captured and name in frame.f_locals:
                return frame.f_locals[name]
        raise StateError(
            f"backend 'onelora' does not find the model that {captured[2]} in {captured[0]} was called for: call "
            "onelora.adapt(model) before"
        )

    return find


def guard_identity(source: Any) -> None:
    """Make the graph that is being compiled valid only for this very object."""
    from torch._dynamo.guards import GuardBuilder, install_guard

    install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def own_attribute(source: Any, name: str) -> Any:
    """The source of what a module holds under a name that its class and `nn.Module` know nothing of."""
    from torch._dynamo.source import AttrSource, DictGetItemSource

    return DictGetItemSource(AttrSource(source, "__dict__"), name)


def callers() -> Iterator[FrameType]:
    """The call that asks and those around it, from the innermost on; in a backward on a GPU they end at the engine."""
    frame = sys._getframe().f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


def _value(source: Any, names: dict[str, Any], scope: dict[str, Any]) -> Any:
    text = source.name() if callable(source.name) else source.name  # a method in some releases
    try:
        return eval(text, dict(names), scope)
    except Exception:  # a source that is no plain expression is not on the way to a module's parameter either
        return None


def _bases(source: Any) -> Iterable[Any]:
    """The source and those of the values that it goes through, innermost first."""
    while source is not None:
        yield source
        source = getattr(source, "base", None)
