"""Which weights a module uses itself, without calling the module that holds them: `F.linear(x, self.w)`, `x @ self.w`.

Nobody can tell from a parameter whether it is the weight of a linear op, nor which of its axes are inputs; the code
can.  So the forward of a module that holds such parameters, or that reads a weight of a child, is traced symbolically
(`torch.fx`), on its own and without inputs, and the same matcher as for captured graphs finds the linear ops.  Where
the code depends on values, the trace follows one answer and then the other, and keeps what it saw before it failed:
what it misses is found, and named in a warning, when a graph of the model is captured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from onelora_compile.adapting.reachable_names import Known, names_in_reach
from onelora_compile.kinds import is_conv1d, is_linear, is_plain
from onelora_compile.looking.untouched import Kept, silently
from onelora_compile.passes.sites.linear_site import match_linear
from onelora_compile.passes.sites.other_uses import other_reads, other_uses
from onelora_compile.passes.sites.weight_path import input_axes, run_of_shapes

_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
_PAST = "onelora_past"  # key in node.meta: of a parameter that was not read as an attribute
_MOST_ANSWERS = 1000  # then a loop on values is taken for endless
BOTH_WAYS = "its weight is used as W and as its transpose: one vector can't be both"
INSIDE = "used in the forward of a linear that is adapted by its own weight or output"
MIXED = "used as a view that mixes its axes, so which of them are inputs can't be told"
PAST = "taken out of a dictionary or a list of parameters, where it can't be handed out adapted"
KEPT = (BOTH_WAYS, PAST)  # reasons that no other use of the weight takes away
READ = "read besides by an op that is no linear one"
# `forward`: of a class, nn.Linear.forward(self.child, x), is no call of the child.
_OF_PARAMETERS = {"weight", "_parameters", "parameters", "named_parameters", "get_parameter", "state_dict", "forward"}
_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclasses.dataclass(frozen=True)
class DirectRead:
    """A weight that is read where it is used.

    Attributes:
        module: the module that holds it.
        parameter: its name there.
        dims: its input axes; None where they are not known.
        convolution: whether it is used by a convolution.
        why: why they are not known.
    """

    module: nn.Module
    parameter: str
    dims: tuple[int, ...] | None
    convolution: bool = False
    why: str = ""


def direct_reads(model: nn.Module, called: Container[nn.Module] = ()) -> list[DirectRead]:
    """The weights that the modules of a model read themselves, each once.

    Args:
        model: the model.
        called: modules that are linears as they are called, so that what they do inside is known.
    """
    found: dict[tuple[nn.Module, str], DirectRead] = {}
    known_names: Known = {}
    for module in model.modules():
        for read in _reads_of(module, known_names) if module not in called or _holds_more(module) else ():
            if module in called and read.module is module:
                if read.parameter == "weight":
                    continue
                read = dataclasses.replace(read, dims=None, why=INSIDE)
            if read.why == READ and (read.module not in called or read.parameter != "weight"):
                continue  # no weight of a linear op, as far as this tells
            key = (read.module, read.parameter)
            known = found.get(key)
            if known is None or read.why == PAST or (known.dims is None and known.why not in KEPT and read.dims):
                found[key] = read
            elif None not in (known.dims, read.dims) and known.dims != read.dims:
                found[key] = dataclasses.replace(known, dims=None, why=BOTH_WAYS)
    return [*found.values(), *_by_other_names(model, found)]


def _by_other_names(model: nn.Module, found: dict[tuple[nn.Module, str], DirectRead]) -> Iterator[DirectRead]:
    """The same reads of what shares a weight: a trace tells which parameter was read, not through which module.

    An embedding does not change with the linear that it shares its weight with, so what is read there stays.
    """
    reads = {id(read.module._parameters[read.parameter]): read for read in found.values()}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if (read := reads.get(id(weight))) is None or (module, name) in found:
                continue
            as_called = not is_linear(module) or read.dims in (None, (0,) if is_conv1d(module) else (1,))
            if as_called and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                yield dataclasses.replace(read, module=module, parameter=name)


def _reads_of(module: nn.Module, known: Known) -> Iterator[DirectRead]:
    if isinstance(module, nn.MultiheadAttention):
        # Known: torch/nn/modules/activation.py hands them to one function.
        packed = (name for name in _PACKED if module._parameters.get(name) is not None)
        yield from (DirectRead(module, name, (1,)) for name in packed)
        yield DirectRead(module.out_proj, "weight", (1,))
    elif _holds_weights(module) or (next(module.children(), None) is not None and _names_weights(module, known)):
        yield from _traced(module)


def _holds_more(module: nn.Module) -> bool:
    """Whether a linear has weights besides its own."""
    return sum(p is not None and p.ndim > 1 for p in module._parameters.values()) > 1


def _holds_weights(module: nn.Module) -> bool:
    """Whether the module has parameters of its own that could be weights, or a child that is a list of them."""
    if type(module).__module__.startswith("torch.nn."):
        return False
    lists = [child for child in module.children() if isinstance(child, _CONTAINERS)]
    own = [parameter for holder in (module, *lists) for parameter in holder._parameters.values()]
    return any(parameter is not None and parameter.ndim >= 2 and is_plain(parameter) for parameter in own)


def _names_weights(module: nn.Module, known: Known) -> bool:
    """Whether code that the forward can reach names the weight of a module, or the parameters of one."""
    return not _OF_PARAMETERS.isdisjoint(names_in_reach(module, known))


def _traced(module: nn.Module) -> Iterator[DirectRead]:
    kept = Kept(module)
    for gm in _traces(module, kept):
        for site in match_linear(gm):
            if site.chain is None or (held := _parameter(module, site.chain.root)) is None:
                continue
            dims = None if (past := _PAST in site.chain.root.meta) else input_axes(site.chain, held[2].shape, site.axes)
            yield DirectRead(*held[:2], dims, site.kind == "conv", PAST if past else MIXED if dims is None else "")
        for use in other_uses(gm):
            if (held := _parameter(module, use.root)) is not None:
                yield DirectRead(*held[:2], None, why=use.reason)
        for root in other_reads(gm):
            if (held := _parameter(module, root)) is not None:
                yield DirectRead(*held[:2], None, why=PAST if _PAST in root.meta else READ)


def _traces(module: nn.Module, kept: Kept) -> Iterator[fx.GraphModule]:
    """The graph for every pair of answers that makes a difference; the module is as before after each."""
    plain = inspect.signature(type(module).forward).parameters.values()
    for defaults in (True, False) if any(one.default is not one.empty for one in plain) else (True,):
        for answer in (False, True):
            with kept:
                gm, asked = silently(_trace, module, answer, defaults)
            yield gm
            if not asked:
                break


def _parameter(module: nn.Module, root: fx.Node) -> tuple[nn.Module, str, Tensor] | None:
    """The module that holds a parameter of the graph, its name there, and it; None if it can't be a weight."""
    path, _, name = str(root.target).rpartition(".")
    holder = module.get_submodule(path)
    weight = holder._parameters.get(name)
    return None if weight is None or not is_plain(weight) or weight.ndim < 2 else (holder, name, weight)


def _trace(module: nn.Module, answer: bool, defaults: bool) -> tuple[fx.GraphModule, int]:
    """The graph of one forward, as far as it can be followed, and how many answers it asked for.

    Args:
        module: whose forward.
        answer: what an `if` on a value goes by.
        defaults: whether arguments with a default keep it, or are values as the others.
    """
    # A module of its own, as the class is another; what the forward changes elsewhere is put back by `Kept`.
    shadow = object.__new__(_with_plain_forward(type(module), defaults))
    shadow.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        shadow.__dict__[name] = dict(getattr(module, name))
    tracer = _Tracer(answer)
    try:
        # What the code prints is about values that it does not have.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            graph = tracer.trace(shadow)
    except Exception:  # the user's code on values that it does not expect may raise anything
        graph = tracer.graph
        graph.output(None)
    for node in graph.nodes:
        tracer.note(node)
    return fx.GraphModule(shadow, graph), tracer.asked


def _with_plain_forward(kind: type[nn.Module], defaults: bool) -> Any:
    """A subclass whose forward has one plain argument for each value that the real one is given.

    `torch.fx` reads the arguments off the code object, and stumbles over decorators, `*args` and `**kwargs`.
    """
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    plain = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    given = [one.name for one in plain if one.default is one.empty or not defaults]
    if any(one.kind is one.VAR_POSITIONAL for one in parameters) and not given:
        given = ["value"]
    names = "".join(f", value_{i}" for i in range(len(given)))
    code = f"lambda self{names}: run(self{names})"
    return type(kind.__name__, (kind,), {"forward": eval(code, {"run": kind.forward})})


def _output_of_a_module(*args: Any, **kwargs: Any) -> None:
    """Stands in the graph for the call of a submodule."""


class _Value(fx.Proxy):
    """A value of which code may ask more than a graph can hold: its length, or a number. It is 1."""

    def __len__(self) -> int:
        return self.tracer.length(self)  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return 1

    def __int__(self) -> int:
        return 1

    def __float__(self) -> float:
        return 1.0


def _storage(tensor: Tensor) -> int:
    """What tells whether two tensors share memory; 0 where there is none."""
    return tensor.data_ptr() if tensor.layout == torch.strided and not tensor.is_meta and is_plain(tensor) else 0


def _stored_parameter(module: nn.Module, target: str) -> Any:
    """Stands for `get_parameter`, which takes nothing but an `nn.Parameter`: no proxy, and no adapted weight either."""
    path, _, name = target.rpartition(".")
    return module.get_submodule(path)._parameters[name]


class _Tracer(fx.Tracer):
    """Follows one forward; submodules are not entered."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer
        self.asked = 0
        self.proxy_buffer_attributes = True
        self.stored: dict[int, nn.Parameter] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of the forward of a module."""
        self.stored = {_storage(parameter): parameter for parameter in root.parameters() if is_plain(parameter)}
        own = nn.Module.get_parameter
        nn.Module.get_parameter = _stored_parameter  # type: ignore[method-assign, assignment]
        try:
            return super().trace(root, concrete_args)
        finally:
            nn.Module.get_parameter = own  # type: ignore[method-assign]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Some value: a submodule is traced on its own, and one that is not registered is no part of the model."""
        del m, forward
        return self.create_proxy("call_function", _output_of_a_module, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        """A parameter that the code did not read as an attribute, where it would be a proxy, is marked."""
        known = self.stored.get(_storage(a)) if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) else None
        argument = super().create_arg(a if known is None else known)  # what state_dict() holds shares memory
        if (known is not None or isinstance(a, nn.Parameter)) and isinstance(argument, fx.Node):
            argument.meta[_PAST] = True
        return argument

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What an `if` on a value goes by."""
        self.asked += 1
        if self.asked > _MOST_ANSWERS:
            raise fx.proxy.TraceError("a loop that depends on values")
        return self.answer

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """The parts of a weight, or one stand-in for the parts of anything else."""
        parts: Any = obj
        return iter([parts[i] for i in range(self.length(obj))])

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What the code gets to see of a node."""
        return _Value(node, self)

    def length(self, obj: fx.Proxy) -> int:
        """How many parts a value has, as far as it is known."""
        self.note(obj.node)
        value = obj.node.meta.get("val")
        return len(value) if isinstance(value, (tuple, Tensor)) else 1

    def note(self, node: fx.Node) -> None:
        """Leave on a node that is a parameter, or a view of one, what it would be, without memory."""
        if "val" in node.meta:
            return
        node.meta["val"] = None
        if node.op == "get_attr":
            value: Any = self.root
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor):
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        elif node.args and isinstance(node.args[0], fx.Node):
            self.note(node.args[0])
            run_of_shapes(node)
