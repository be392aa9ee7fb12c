"""The one file that touches private API of Dynamo and Inductor, each use with what it relies on.

Read in torch 2.11 to 2.13:
- `torch/_dynamo/output_graph.py::_call_user_compiler`: a backend gets a graph whose placeholders carry
  `_dynamo_source`, and whose module carries `_param_name_to_source`; `AOTAutograd` asserts on both
  (`torch/_functorch/_aot_autograd/frontend_utils.py`).  After the backend returns, Dynamo reads the placeholders of
  that same graph to generate code, so a backend that adds inputs must do so in a copy.
- `torch/_dynamo/source.py`: a source is the expression by which the frame reaches a value.
- `torch/_dynamo/guards.py`: guards are built after the backend returns, from the values as they are then.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

from onelora_compile.errors import ConfigError

Compiler = Callable[..., Any]  # (graph, example inputs) -> compiled function


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that passes may change, inputs and graphs inside included; other modules are shared."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    if (output := graph.graph_copy(gm.graph, nodes)) is not None:
        graph.output(output)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    # node_copy leaves out attributes that are not fx's own.
    for old, new in nodes.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    for node in graph.find_nodes(op="get_attr"):
        if isinstance(inner := getattr(copy, str(node.target), None), fx.GraphModule):
            setattr(copy, str(node.target), copy_graph(inner))
    return copy


def mark_new_inputs(gm: fx.GraphModule) -> None:
    """Tell AOTAutograd that inputs which a pass added have no source in the user's frame."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if not hasattr(node, "_dynamo_source"):
            node._dynamo_source = None


def break_reason(gm: fx.GraphModule) -> str:
    """Why Dynamo ended this graph where it does, "" for the end of the frame."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(getattr(reason, "reason", "") or "")


def frame_roots(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[nn.Module, Any]:
    """The outermost modules that the frame being compiled reaches the graph's parameters through, with sources.

    Empty for a graph that does not come from Dynamo.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:  # no frame is being compiled
        return {}
    scope = {"L": frame.f_locals, "G": frame.f_globals}
    roots: dict[nn.Module, Any] = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, nn.Parameter):
            for source in reversed(list(_bases(getattr(node, "_dynamo_source", None)))):
                module = _value(source, frame.f_globals, scope)
                if isinstance(module, nn.Module):
                    roots.setdefault(module, source)
                    break
    return roots


def compiled_module(module: nn.Module) -> nn.Module:
    """The module that the user gave to `torch.compile`, if `module` is a part of it; else `module`.

    After a graph break Dynamo compiles the frames of inner modules one by one; the frames that called them are
    still on Python's stack.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        called = frame.f_locals.get("self") if frame.f_code.co_name in ("__call__", "_wrapped_call_impl") else None
        if not isinstance(called, nn.Module):
            continue
        inner = called._modules.get("_orig_mod")
        if inner is None and getattr(called, "_compiled_call_impl", None) is not None:
            inner = called
        if inner is not None and any(part is module for part in inner.modules()):
            return inner
    return module


def calling_module(node: fx.Node, modules: Mapping[int, nn.Module]) -> nn.Module | None:
    """The innermost module whose forward made the node; `modules` are the candidates by `id`.

    Source: `torch/_dynamo/variables/nn_module.py::record_nn_module_stack`, keys `<id>` or `<id>@<call>`.
    """
    keys = list(node.meta.get("nn_module_stack") or {})
    number = keys[-1].partition("@")[0] if keys else ""
    return modules.get(int(number)) if number.isdecimal() else None


def guard_vector(root_source: Any, name: str, vector: str) -> None:
    """Make the graph that is being compiled valid only for this very parameter of the module `name` under the root.

    A graph that got its vectors by insertion holds them itself; a copy of the model, or another one of the same
    class, must not run it.  The graph keeps the vector alive, so its identity can't be taken over by another.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, DictGetItemSource

    source = root_source
    for part in name.split(".") if name else []:
        source = DictGetItemSource(AttrSource(source, "_modules"), part)
    source = DictGetItemSource(AttrSource(source, "_parameters"), vector)
    install_guard(source.make_guard(GuardBuilder.ID_MATCH))


@contextlib.contextmanager
def on_examples(values: Iterable[Any]) -> Iterator[None]:
    """Run operators on the example values of a graph: in their own fake mode, and with symbolic sizes.

    Source: `torch/_functorch/aot_autograd.py`, which traces under both.
    """
    mode = next((mode for value in values if (mode := getattr(value, "fake_mode", None))), None)
    with mode or contextlib.nullcontext(), enable_python_dispatcher():
        yield


def size_hint(size: Any) -> int | None:
    """The value that a size of a graph had when it was captured, without guarding on it; None if it is not known.

    Source: `torch/fx/experimental/sym_node.py::SymNode.hint`.
    """
    if isinstance(size, int):
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return hint if isinstance(hint, int) else None


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """Run operators on real tensors, whatever fake or tracing mode a compilation is in.

    Source: `torch/utils/_python_dispatch.py`.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def inner_compiler(inner: str | Callable[..., Any], mode: str | None, options: Mapping[str, Any]) -> Compiler:
    """The backend that compiles the rewritten graph.

    Raises:
        ConfigError: a backend of that name does not exist, or `mode` with another backend than Inductor.
    """
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **options}
        fx_compiler: Compiler = compile_fx
        return functools.partial(fx_compiler, config_patches=patches) if patches else fx_compiler
    if mode:
        raise ConfigError(f"mode={mode!r} is Inductor's; it can't be combined with inner={inner!r}")
    if isinstance(inner, str):
        from torch._dynamo.backends.registry import lookup_backend
        from torch._dynamo.exc import InvalidBackend

        try:
            compiler: Compiler = lookup_backend(inner)
        except InvalidBackend as error:
            known = ", ".join(torch.compiler.list_backends())
            raise ConfigError(f"option inner={inner!r}: there is no such backend; known are {known}") from error
    else:
        compiler = inner
    return functools.partial(compiler, options=dict(options)) if options else compiler


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
