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
import copy
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

from onelora_compile.errors import ConfigError, StateError

Compiler = Callable[..., Any]  # (graph, example inputs) -> compiled function

_MANY = 1_000_000
_TOKEN = "_onelora_first_call"  # attribute of a module


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that passes may change, inputs and graphs inside included; other modules are shared."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    if (output := graph.graph_copy(gm.graph, nodes)) is not None:
        graph.output(output)
    twin = fx.GraphModule(gm, graph)
    twin.meta = dict(gm.meta)
    # node_copy leaves out attributes that are not fx's own.
    for old, new in nodes.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(twin, name, getattr(gm, name))
    for node in graph.find_nodes(op="get_attr"):
        if isinstance(inner := getattr(twin, str(node.target), None), fx.GraphModule):
            setattr(twin, str(node.target), copy_graph(inner))
    return twin


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


def break_reason(gm: fx.GraphModule) -> str:
    """Why Dynamo ended this graph where it does, "" for the end of the frame."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(getattr(reason, "reason", "") or "")


def frame_roots(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[nn.Module, Any]:
    """The outermost modules that the frame being compiled reaches the graph's parameters through, with sources.

    Empty for a graph that does not come from Dynamo.
    """
    if (frame := _frame()) is None:
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


def calling_modules(node: fx.Node) -> list[str]:
    """The modules whose forward made the node, outermost first, each as its `id` in digits.

    Source: `torch/_dynamo/variables/nn_module.py::record_nn_module_stack`, keys `<id>` or `<id>@<call>`.
    """
    return [str(key).partition("@")[0] for key in node.meta.get("nn_module_stack") or {}]


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
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            code = frame.f_code
            if (code.co_filename, code.co_firstlineno, code.co_name) == captured and name in frame.f_locals:
                return frame.f_locals[name]
            frame = frame.f_back
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


@contextlib.contextmanager
def apart(backend: Compiler) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """Yield a `torch.compile` whose captures leave nothing behind in Dynamo, and throw nothing of the user's away.

    Dynamo keeps its graphs on the code objects of functions, a limited number for each, and remembers sizes that
    changed.  Source: `torch/_dynamo/eval_frame.py`, `convert_frame.py`, `pgo.py` of torch 2.11 to 2.15.

    Args:
        backend: gets the graphs.
    """
    import torch._dynamo
    from torch._C._dynamo import eval_frame
    from torch._dynamo import pgo
    from torch._dynamo.symbolic_convert import InstructionTranslator

    # From torch 2.13 on.
    regions = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    own_region: dict[str, Any] = {"isolate_recompiles": True} if regions else {}
    entries = eval_frame._get_total_cache_entry_count if regions else eval_frame._debug_get_cache_entry_list
    fresh: list[CodeType] = []

    def noting(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        code = InstructionTranslator.current_tx().output.root_tx.f_code
        if not entries(code):
            fresh.append(code)
        return backend(gm, example_inputs)

    limits = torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=_MANY, accumulated_recompile_limit=_MANY
    )
    sizes = pgo.get_code_state()  # which sizes changed from call to call, by code
    before = copy.deepcopy(dict(sizes))
    try:
        with limits, torch.compiler.set_stance("default"):
            yield lambda root: torch.compile(root if regions else _framed(root), backend=noting, **own_region)
    finally:
        for code in fresh:  # the user has compiled none of these
            eval_frame.reset_code(code)
        sizes.clear()
        sizes.update(before)


def _framed(root: nn.Module) -> Callable[..., Any]:
    """A call of a module in a frame of its own, whose code nobody else has: graphs are kept there."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return root(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)


@contextlib.contextmanager
def on_examples(values: Iterable[Any]) -> Iterator[None]:
    """Run operators on the example values of a graph: in their own fake mode, and with symbolic sizes.

    Source: `torch/_functorch/aot_autograd.py`, which traces under both.
    """
    mode = next((mode for value in values if (mode := getattr(value, "fake_mode", None))), None)
    with mode or contextlib.nullcontext(), enable_python_dispatcher():
        yield


def is_of_a_transform(value: Any) -> bool:
    """Whether a value of a graph was made inside a `torch.func` transform: no operator runs on it outside.

    Source: `torch/_C/_functorch.pyi`.
    """
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def any_number_of_rows(table: torch.Tensor) -> torch.Tensor:
    """A table that gets further rows in time: none of them compiles a graph again, and CUDA graphs don't copy it."""
    torch._dynamo.maybe_mark_dynamic(table, 0)
    # With dynamic=True it would have one size with a batch of as many rows as it has columns.
    # As mark_static does, which asks whether anything is compiled, and takes another thread's compilation for its own.
    table._dynamo_static_indices = set(range(1, table.ndim))  # type: ignore[attr-defined]
    torch._dynamo.mark_static_address(table, guard=False)
    return table


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


def write_aoti(program: torch.export.ExportedProgram, path: str) -> None:
    """Compile a program with AOTInductor into a package; documented for users, in a module that is not."""
    torch._inductor.aoti_compile_and_package(program, package_path=path)


def load_aoti(path: str) -> Callable[..., Any]:
    """What an AOTInductor package computes, called as the program is."""
    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(path)
    return loaded


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
