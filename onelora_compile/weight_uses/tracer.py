"""Following code with `torch.fx`: what stands in the graph for a parameter, for the call of a submodule, for a value.

The code runs once, on stand-ins for its values.  A parameter stands in the graph whoever holds it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from onelora_compile.dynamo.fx_trace import trace_here
from onelora_compile.passes.sites.weight_path import run_of_shapes
from onelora_compile.weight_uses.endless_loops import Loops
from onelora_compile.weight_uses.followed_values import Value, any_of, is_code
from onelora_compile.weight_uses.holders import Holders
from onelora_compile.weight_uses.replaced_functions import output_of_a_module, part_of_a_value, stored_parameter

PAST_MARK = "onelora_past"  # key in node.meta: of a parameter that was not read as an attribute
CALLED = "onelora_called"  # key in node.meta: the module whose output a node is
Inside = dict[int, tuple[nn.Module, str]]


class Tracer(fx.Tracer):
    """Follows one function."""

    def __init__(
        self, answers: Sequence[bool], size: int, holders: Holders, inside: Inside, entered: Collection[nn.Module] = ()
    ) -> None:
        super().__init__()
        self._answers = answers
        self.asked = 0
        self.guessed = False
        self._size = size
        self.proxy_buffer_attributes = True
        self.parameters: dict[str, nn.Parameter] = {}  # by the target of their node
        self._holders = holders
        self._inside = inside
        self.replaced: list[tuple[nn.Module, str]] = []
        self._proxies: dict[tuple[int, bool], fx.Proxy] = {}
        self._entered = set(entered)
        self._thread = threading.get_ident()
        self._loops = Loops(CALLED)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of the forward of a module."""
        kind: Any = nn.Module
        own = kind.get_parameter, kind.__setattr__
        kind.get_parameter = stored_parameter
        kind.__setattr__ = lambda module, name, value: self._assign(own[1], module, name, value)
        try:
            return trace_here(self, root)
        finally:
            kind.get_parameter, kind.__setattr__ = own

    def holder(self, parameter: nn.Parameter) -> tuple[nn.Module, str] | None:
        """The module that holds it, one inside the followed module rather than another; None outside the model."""
        return self._inside.get(id(parameter)) or self._holders.of.get(id(parameter))

    def as_node(self, value: Any, nodes: list[Any]) -> Any:
        """A node as it is, one for a parameter that was not read as an attribute, or another value; adds nodes."""
        if not isinstance(value, fx.Proxy):
            parameter = self._holders.parameter(value)
            if parameter is None or self._elsewhere():
                return value
            value = self._proxy(parameter, past=True)
        nodes.append(value)
        return value

    def _proxy(self, parameter: nn.Parameter, past: bool) -> fx.Proxy:
        key = (id(parameter), past)
        if key not in self._proxies:
            target = f"onelora_parameter_{len(self._proxies)}"
            self.parameters[target] = parameter
            self._proxies[key] = self.create_proxy("get_attr", target, (), {})
            if past:
                self._proxies[key].node.meta[PAST_MARK] = True
        return self._proxies[key]

    def _elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What an attribute of a module gives."""
        if self._elsewhere():
            return attr_val
        if isinstance(attr_val, nn.Parameter):
            return self._proxy(attr_val, past=False)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Some value: a submodule is followed on its own, but for one that is given a weight, or code to run.

        A weight that went through an `nn.Identity` is that weight.
        """
        if self._elsewhere() or m in self._entered or type(m) is nn.Identity:
            return forward(*args, **kwargs)
        own = type(m) is nn.Sequential or not type(m).__module__.startswith("torch.")
        if own and any_of((args, kwargs), is_code):
            with contextlib.suppress(Exception):  # as for the whole
                return forward(*args, **kwargs)
            args = (*args, *self._weights_in((args, kwargs)))  # which it may read in any way
        node = self.create_proxy("call_function", output_of_a_module, args, kwargs)
        node.node.meta[CALLED] = m
        if own and any_of((args, kwargs), self._is_weight):  # a parameter, or a view of one
            with contextlib.suppress(Exception):  # as for the whole
                forward(*args, **kwargs)
        return node

    def _weights_in(self, values: Any) -> list[fx.Proxy]:
        """The weights of the modules in nested containers."""
        found: list[Any] = []
        fx.node.map_aggregate(values, lambda one: found.append(one) if isinstance(one, nn.Module) else None)
        held = (p for module in found for p in module._parameters.values() if p is not None and p.ndim > 1)
        return [self._proxy(parameter, past=False) for parameter in held]

    def _assign(self, own: Any, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute; a parameter, and the one that takes its place, can't be handed out adapted."""
        before = vars(module).get("_parameters", {}).get(name)
        if self._elsewhere() or before is None or not isinstance(value, (fx.Proxy, nn.Parameter)):
            return own(module, name, value)
        given = self.parameters.get(str(value.node.target)) if isinstance(value, fx.Proxy) else value
        held = [self.holder(one) for one in (before, given) if isinstance(one, nn.Parameter) and one.ndim > 1]
        self.replaced += [one for one in held if one is not None]
        stored: Any = module._parameters
        stored[name] = value
        return None

    def call_with(
        self, call: Any, module: nn.Module, values: Any, args: Any = None, kwargs: Any = None, **options: Any
    ) -> Any:
        """Stands for `torch.func.functional_call`: runs a module's code on nodes in the place of its parameters."""
        if self._elsewhere():
            return call(module, values, args, kwargs, **options)
        own: list[tuple[nn.Module, str, nn.Parameter]] = []
        entered = set(module.modules()) - self._entered
        self._entered |= entered
        try:
            for key, value in values.items():
                path, _, name = key.rpartition(".")
                stored: Any = module.get_submodule(path)._parameters
                parameter = stored.get(name)
                if parameter is not None and value is not parameter:
                    own.append((module.get_submodule(path), name, parameter))
                    other = self._holders.parameter(value)
                    stored[name] = value if other is None else self._proxy(other, past=True)
            return module(*(args if isinstance(args, tuple) else () if args is None else (args,)), **(kwargs or {}))
        finally:
            self._entered -= entered
            self.replaced += [(holder, name) for holder, name, parameter in own if parameter.ndim > 1]
            for holder, name, parameter in own:
                holder._parameters[name] = parameter

    def vmap(self, run: Any, function: Any, in_dims: Any, *options: Any) -> Any:
        """Stands for `torch.func.vmap`: runs the function once, on some value for a part of a value."""
        out_dims, randomness, chunk_size, *args = options
        values, spec = pytree.tree_flatten(tuple(args))
        if self._elsewhere() or not any(isinstance(value, fx.Proxy) for value in values):
            return run(function, in_dims, out_dims, randomness, chunk_size, *args)
        dims = pytree._broadcast_to_and_flatten(in_dims, spec) or [0] * len(values)
        parts = (
            value if dim is None else self.create_proxy("call_function", part_of_a_value, (value,), {})
            for value, dim in zip(values, dims, strict=True)
        )
        return function(*pytree.tree_unflatten(parts, spec))

    def _is_weight(self, value: Any) -> bool:
        node = value.node if isinstance(value, fx.Proxy) else None
        while isinstance(node, fx.Node) and node.op in ("call_method", "call_function") and node.args:
            node = node.args[0]  # type: ignore[assignment]
        return isinstance(node, fx.Node) and node.target in self.parameters

    def create_arg(self, a: Any) -> Any:
        """A parameter that the code did not read as an attribute, where it would be a proxy, is marked."""
        if isinstance(a, nn.Module):  # where it is called, or read, is what counts
            return f"{type(a).__name__} at {id(a)}"
        value = self.as_node(a, [])
        if isinstance(value, nn.Parameter) and not self._elsewhere():
            value = self._proxy(value, past=False)
        try:
            return super().create_arg(value)
        except NotImplementedError:  # an object of the user's, such as a cache: itself and no other
            return f"{type(value).__name__} at {id(value)}"

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What an `if` on a value goes by."""
        self._loops.asks(self.graph)
        self.asked += 1
        return self._answers[min(self.asked, len(self._answers)) - 1]

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """The parts of a weight, or one stand-in for the parts of anything else."""
        parts: Any = obj
        return iter([parts[i] for i in range(self.length(obj))])

    def keys(self, obj: fx.Proxy) -> Any:
        """The names in a value that is handed on as keywords: none that are known."""
        return iter(())

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What the code gets to see of a node."""
        return Value(node, self)

    def length(self, obj: fx.Proxy) -> int:
        """How many parts a value has, as far as it is known."""
        self.note(obj.node)
        value = obj.node.meta.get("val")
        return len(value) if isinstance(value, (tuple, Tensor)) else self.guess()

    def guess(self) -> int:
        """A number that only values could tell."""
        self._loops.asks(self.graph)
        self.guessed = True
        return self._size

    def number(self) -> float:
        """The same, where it is none of sizes."""
        self._loops.asks(self.graph)
        return 1.0

    def note(self, node: fx.Node) -> None:
        """Leave on a node that is a parameter, or a view of one, what it would be, without memory."""
        if "val" in node.meta:
            return
        node.meta["val"] = None
        if node.op == "get_attr":
            value: Any = self.parameters.get(str(node.target))
            if value is None:
                value = self.root
                for part in str(node.target).split("."):
                    value = getattr(value, part)
            if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        elif node.args and isinstance(node.args[0], fx.Node):
            self.note(node.args[0])
            run_of_shapes(node)
