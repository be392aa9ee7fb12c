"""The way of a weight through a graph, from its parameter to the op that uses it: views, slices, casts.

    W -> chunk(3) -> [1] -> t      is the chain (chunk, getitem, t)

The same chain applied to a vector gives the part of the vector that belongs to that use: a vector is laid out like
its weight with stride 0 along the input axes, and whatever is a view of the weight is a view of it.  Where the input
axis of the use still has stride 0 the vector is constant along it, and only there the update may move.
"""

from __future__ import annotations

import builtins
import dataclasses
import itertools
from collections.abc import Callable, Container, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from onelora_compile.ops import ADAPTED_WEIGHT
from onelora_compile.passes.sites.operators import op_name

_VIEWS = {
    *("t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "adjoint"),
    *("numpy_T", "mT", "matrix_H", "mH"),  # what Dynamo of torch 2.14 and newer makes of the attributes
    *("view", "reshape", "unflatten", "flatten", "unsqueeze", "squeeze", "_unsafe_view", "view_as", "ravel"),
    *("chunk", "split", "split_with_sizes", "unbind", "tensor_split", "select", "narrow", "slice", "getitem"),
    *("expand", "expand_as", "broadcast_to", "hsplit", "vsplit", "dsplit", "unsafe_chunk", "unsafe_split"),
}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "_to_copy", "alias"}
_INDEX = {"index", "index_select"}
_ATTRIBUTES = {"T", "mT", "H", "mH"}
_INDEXED = "onelora_indexed"  # key in node.meta
_FAILED = (RuntimeError, IndexError, TypeError, ValueError)  # of a view that does not exist


@dataclasses.dataclass(frozen=True)
class Chain:
    """How a node comes from a parameter.

    Attributes:
        root: the node of the parameter.
        adapted: the `adapted_weight` node that the weight went through, None for one that is not adapted.
        nodes: what came after, in order.
    """

    root: fx.Node
    adapted: fx.Node | None = None
    nodes: tuple[fx.Node, ...] = ()

    def then(self, node: fx.Node) -> Chain:
        """The chain that is longer by one node."""
        return dataclasses.replace(self, nodes=(*self.nodes, node))


def weight_chains(gm: fx.GraphModule, parameters: Container[fx.Node] = ()) -> dict[fx.Node, Chain]:
    """Every node that is a parameter (or one of `parameters`), or nothing but a view, a slice or a cast of one."""
    chains: dict[fx.Node, Chain] = {}
    for node in gm.graph.nodes:
        if node in parameters or is_parameter(node):
            chains[node] = Chain(node)
        elif node.target is ADAPTED_WEIGHT and (chain := chains.get(node.args[0])) and not chain.nodes:
            chains[node] = Chain(chain.root, node)
        elif _name(node) is not None and node.args and (chain := chains.get(node.args[0])) and _keeps_numbers(node):
            chains[node] = chain.then(node)
    return chains


def _keeps_numbers(node: fx.Node) -> bool:
    """Whether a view or cast of a weight has its numbers, up to a rounding that training could have chosen.

    Not so for integers, bits (`view(torch.int16)`) and floats of one byte: there W + vector 1ᵀ is another weight than
    the update of the output stands for.
    """
    if any(isinstance(argument, torch.dtype) for argument in (*node.args, *node.kwargs.values())):
        if _name(node) in _VIEWS:
            return False
    value = example(node)
    return value is None or (value.is_floating_point() and value.dtype.itemsize >= 2)


def is_parameter(node: fx.Node) -> bool:
    """Whether the node is a parameter of the model."""
    if node.op == "get_attr":
        held: Any = node.graph.owning_module
        for part in str(node.target).split(".") if held is not None else ():
            held = getattr(held, part, None)
        return isinstance(held, Tensor)
    if node.op != "placeholder":
        return False
    # torch.export marks nothing on the node; its placeholders of parameters are named p_…
    return isinstance(example(node), nn.Parameter) or node.name.startswith("p_") or "_parameters_" in node.name


def example(node: fx.Node) -> Tensor | None:
    """The fake tensor that the capture left on a node; Dynamo and export use different keys."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None


def input_axes(chain: Chain, shape: Sequence[int], used: Sequence[int]) -> tuple[int, ...] | None:
    """Which axes of the stored weight become the axes `used` of what the chain ends with; None if no axes do.

    Args:
        chain: from the parameter.
        shape: of the stored weight.
        used: the contracted axes of the use, counted from the end.
    """
    for dims in itertools.combinations(reversed(range(len(shape))), len(used)):
        if len(dims) < len(shape) and constant_along(chain, shape, dims, used):
            return tuple(sorted(dims))
    return None


def constant_along(chain: Chain, shape: Sequence[int], dims: Sequence[int], used: Sequence[int]) -> bool:
    """Whether W + vector 1ᵀ with the ones along `dims` differs from W, after the chain, by the same along `used`."""
    try:
        end = replay(chain, _probe(shape, dims), _counted)
    except _FAILED:
        return False
    if not isinstance(end, Tensor) or end.ndim < max((-axis for axis in used), default=0):
        return False
    return all(end.stride(axis) == 0 for axis in used)


def part_of_vector(
    chain: Chain, vector: Any, dims: Sequence[int], used: Sequence[int], shape: Sequence[int], value_of: Callable
) -> Any:
    """The part of a vector, or of a proxy of one, that belongs to the end of a chain: its axes less the used ones.

    Args:
        chain: from the parameter.
        vector: with the axes of the stored weight less `dims`.
        dims: input axes of the stored weight.
        used: the contracted axes at the end of the chain, counted from the end.
        shape: of the stored weight.
        value_of: what stands for another argument of the chain's nodes.
    """
    if all(_name(node) in _CASTS for node in chain.nodes):
        return vector
    return _part(chain, vector, dims, used, None if _lines_up(chain, dims, used, shape) else shape, value_of)


def _lines_up(chain: Chain, dims: Sequence[int], used: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether the chain does the same with input axes of size 1, which cost nothing, backward included."""
    rows = [size for axis, size in enumerate(shape) if axis not in dims]
    vector = torch.arange(prod(rows), device="cpu").view(rows)
    try:
        narrow = _part(chain, vector, dims, used, None, _zeros)
        return torch.equal(narrow, _part(chain, vector, dims, used, shape, _zeros))
    except _FAILED:
        return False


def _part(
    chain: Chain,
    vector: Any,
    dims: Sequence[int],
    used: Sequence[int],
    shape: Sequence[int] | None,
    value_of: Callable[[Any], Any],
) -> Any:
    """The vector laid out like the weight, with input axes of size 1 or spread to `shape`, after the chain."""
    for dim in sorted(dims):
        vector = vector.unsqueeze(dim)
    if shape is not None:
        vector = vector.expand(tuple(shape))
    end = replay(chain, vector, value_of, spread=shape is not None)
    for gone, axis in enumerate(sorted(used, reverse=True)):
        end = end.select(axis + gone, 0)
    return end


def replay(chain: Chain, start: Any, value_of: Callable[[Any], Any], spread: bool = True) -> Any:
    """Apply a chain to another tensor of the weight's shape (or a proxy of one); casts are left out.

    Args:
        chain: what to apply.
        start: in place of the weight; stride 0 along the input axes, or size 1 if not `spread`.
        value_of: what stands for another argument of the chain's nodes.
        spread: see `start`.
    """
    value = start
    for node in chain.nodes:
        name = _name(node)
        if name in _CASTS:
            continue
        rest = fx.map_arg(node.args[1:], value_of)
        kwargs = fx.map_arg(node.kwargs, value_of)
        if spread and (name in _INDEX or (name == "getitem" and _by_tensor(node, value, rest[0]))):
            value = _indexed(node, value, rest, kwargs)
        elif node.op == "call_method":
            value = getattr(value, str(node.target))(*rest, **kwargs)
        else:
            value = _callable(node)(value, *rest, **kwargs)
    return value


def _indexed(node: fx.Node, value: Any, rest: Any, kwargs: Any) -> Any:
    """Rows picked by a tensor: a copy, so only one entry of each constant axis is picked, then spread again."""
    if not isinstance(value, Tensor):  # a proxy: what the shape-only run found out is kept on the node
        constant, shape = node.meta[_INDEXED]
    else:
        constant = [axis for axis, stride in enumerate(value.stride()) if stride == 0]
        whole = example(node)
        sizes = (_callable(node)(value, *rest, **kwargs) if whole is None else whole).shape
        # A dynamic size is that of the index: it is there already, and only the constant axes are spread.
        shape = tuple(size if isinstance(size, int) else -1 for size in sizes)
        node.meta[_INDEXED] = constant, shape
    for axis in constant:
        value = value.narrow(axis, 0, 1)
    return _callable(node)(value, *rest, **kwargs).expand(shape)


def _callable(node: fx.Node) -> Callable[..., Any]:
    return getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target  # type: ignore[return-value]


def _name(node: fx.Node) -> str | None:
    """The name of a view, cast or index op; None for everything else."""
    if node.op == "call_function" and node.target is builtins.getattr:
        return "getattr" if node.args[1] in _ATTRIBUTES else None
    name = op_name(node)
    return name if name in _VIEWS or name in _CASTS or name in _INDEX else None


def _by_tensor(node: fx.Node, value: Any, index: Any) -> bool:
    if isinstance(value, fx.Proxy):
        return _INDEXED in node.meta
    parts = index if isinstance(index, tuple) else (index,)
    return isinstance(value, Tensor) and any(isinstance(part, Tensor) for part in parts)


def _probe(shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """A tensor without memory, of the weight's shape, with stride 0 along the input axes and nowhere else."""
    strides: list[int] = []
    step = 1
    for axis in reversed(range(len(shape))):
        strides.insert(0, 0 if axis in dims else step)
        step *= 1 if axis in dims else shape[axis]
    return torch.empty_strided(tuple(shape), tuple(strides), device="meta")


def _meta(node: Any) -> Any:
    """What stands for another node in a run of shapes: its shape, its number, or the index 0."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return 0 if value is None else value


def _counted(node: Any) -> Any:
    """The same with any number for a dynamic size, which would be guarded on if it were asked for its own."""
    value = _meta(node)
    if not isinstance(value, Tensor):
        return value
    return value.new_empty([size if isinstance(size, int) else 2 for size in value.shape])


def _zeros(node: Any) -> Any:
    """What stands for another node in a run of numbers: an index is 0."""
    value = _counted(node)
    return torch.zeros(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value


def run_of_shapes(node: fx.Node) -> None:
    """Leave on a view, slice or cast of a weight what it has as shape, from its first argument's."""
    assert isinstance(node.args[0], fx.Node)
    source = node.args[0].meta.get("val")
    if source is None or _name(node) is None:
        return
    try:
        rest, kwargs = fx.map_arg((node.args[1:], node.kwargs), _meta)
        node.meta["val"] = _callable(node)(source, *rest, **kwargs)
    except _FAILED:
        return
