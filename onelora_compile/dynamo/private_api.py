"""Private API of Dynamo and Inductor: graphs, captures and compilers, each use with what it relies on.

Read in torch 2.11 to 2.13:
- `torch/_dynamo/output_graph.py::_call_user_compiler`: a backend gets a graph whose placeholders carry
  `_dynamo_source`, and whose module carries `_param_name_to_source`; `AOTAutograd` asserts on both
  (`torch/_functorch/_aot_autograd/frontend_utils.py`).  After the backend returns, Dynamo reads the placeholders of
  that same graph to generate code, so a backend that adds inputs must do so in a copy.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

from onelora_compile.errors import ConfigError

Compiler = Callable[..., Any]  # (graph, example inputs) -> compiled function

_MANY = 1_000_000


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


def break_reason(gm: fx.GraphModule) -> str:
    """Why Dynamo ended this graph where it does, "" for the end of the frame."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(getattr(reason, "reason", "") or "")


def calling_modules(node: fx.Node) -> list[str]:
    """The modules whose forward made the node, outermost first, each as its `id` in digits.

    Source: `torch/_dynamo/variables/nn_module.py::record_nn_module_stack`, keys `<id>` or `<id>@<call>`.
    """
    return [str(key).partition("@")[0] for key in node.meta.get("nn_module_stack") or {}]


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
def in_eager() -> Iterator[None]:
    """Calls of what is compiled run as they are written.

    Torch 2.12 warns here of `fullgraph=True`, that nothing was compiled.  Where warnings are errors, that one leaves
    the settings of `dynamic=True` behind for whatever is compiled afterwards.
    Torch 2.11 leaves behind that frames are skipped, where an export calls a module of `fullgraph=True`: what
    breaks a graph afterwards runs uncompiled.
    Source: `torch/_dynamo/eval_frame.py::compile_wrapper`, which from 2.13 on asks for the stance first.
    """
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", "torch.compile with fullgraph=True found no compiled frames")
        frames: Any = torch._C._dynamo.eval_frame
        if set_override := getattr(frames, "set_eval_frame_override", None):  # of torch 2.11
            stack.callback(set_override, set_override(frames._EvalFrameOverride.NONE))
        yield


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


def captures() -> Any:  # a threading.RLock
    """The lock that Dynamo holds from the first look at a frame until its guards are made.

    Guards are made of the values that there are then, not of those that were read (PyTorch 2.11 to 2.15).  What another
    thread changes in between turns a guard around: the graph is taken for the very state that it does not know.
    """
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


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
