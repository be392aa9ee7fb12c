"""Find the linear ops of an FX graph: what is multiplied with a parameter, and what adapts it.

    linear(x, W, c)                        F.linear, aten.linear, a call of a linear submodule
    addmm(c, x, W), x @ W, bmm(x, W)       a weight stored as [in_features, out_features], also of experts
    W @ x, addmm(c, W, x)                  a weight on the left: the features of x are its last axis but one
    einsum("bi,oi->bo", x, W)              where each axis of W is an input, an output, or common to all (experts)
    grouped_mm(x, W, offs)                 rows of x by expert
    conv(x, W, c)                          not a linear op of the paper, but a linear map

W may be a parameter or any view, slice or cast of one (`weight_chain`).  Only looks.  Leaves alone matmuls of two
activations, and embeddings.
"""

from __future__ import annotations

import dataclasses
import operator
import re
import string
from collections.abc import Container, Iterator
from math import prod
from typing import Any

import torch
from torch import fx

from onelora_compile.kinds import is_linear
from onelora_compile.ops import ADAPTED_WEIGHT, ADD_RANK1, RANK1_UPDATE
from onelora_compile.passes.weight_chain import Chain, example, weight_chains

__all__ = ["LinearSite", "example", "match_linear", "module_path", "operands", "rank1_updates", "source_line"]

_LINEAR = {"linear"}
_ADDMM = {"addmm", "baddbmm"}
_MATMUL = {"mm", "matmul", "bmm", "__matmul__"}
_GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
_CONV = {"conv1d", "conv2d", "conv3d"}
# Ops between a linear and its update that only change the leading dimensions.
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.reshape, "view", "reshape"}


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """One linear op in a graph and all that is known of it.

    Attributes:
        node: the linear op.
        kind: "linear", "matmul", "left" (W @ x), "einsum", "grouped", "conv" or "module" (a call of a submodule).
        x: its input [*, in_features].
        weight: the node that holds W as the op uses it; None for a call of a submodule.
        axes: the input axes of that node, counted from its end.
        chain: how it comes from a parameter; None if it does not.
        update: the rank-1 update that adapts the op's output; None where nothing, or its weight, is adapted.
        module: qualified name of the module that made the call, as far as the graph tells; "" if it does not.
        in_features: columns of W, None where the graph has no shapes.
        out_features: rows of W, likewise.
        source: file, line and text of the user's code that made the call, "" if unknown.
    """

    node: fx.Node
    kind: str
    x: fx.Node
    weight: fx.Node | None
    axes: tuple[int, ...]
    chain: Chain | None
    update: fx.Node | None
    module: str
    in_features: int | None
    out_features: int | None
    source: str

    @property
    def vector(self) -> fx.Node | None:
        """The node that holds the vector, None for a linear that is not adapted."""
        if self.update is not None:
            return operands(self.update)[2]
        if self.chain is not None and self.chain.adapted is not None:
            vector = self.chain.adapted.args[1]
            assert isinstance(vector, fx.Node)
            return vector
        return None


def match_linear(gm: fx.GraphModule, parameters: Container[fx.Node] = ()) -> list[LinearSite]:
    """The linear sites of a graph in execution order; subgraphs of higher-order ops are not entered.

    Args:
        gm: the graph.
        parameters: nodes that are parameters, besides those that can be recognised (inputs of a subgraph).

    Example:
        >>> from torch import nn
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> [site.module for site in match_linear(gm)]
        ['0', '2']
    """
    updates = {_linear_below(update): update for update in rank1_updates(gm.graph)}
    chains = weight_chains(gm, parameters)
    sites = []
    for node in gm.graph.nodes:
        if (use := _use(gm, node, chains)) is None:
            continue
        kind, x, weight, axes = use
        chain = chains.get(weight) if weight is not None else None
        sizes = _sizes(gm, node, kind, weight, axes, x)
        path, update = module_path(node), updates.get(node)
        sites.append(LinearSite(node, kind, x, weight, axes, chain, update, path, *sizes, source_line(node)))
    return sites


def rank1_updates(graph: fx.Graph) -> Iterator[fx.Node]:
    """The update nodes, in either spelling: vector in argument 2, output of the linear in argument 0."""
    return (node for node in graph.nodes if node.op == "call_function" and node.target in (RANK1_UPDATE, ADD_RANK1))


def is_update(node: fx.Node) -> bool:
    """Whether the node adapts something: an output or a weight."""
    return node.op == "call_function" and node.target in (RANK1_UPDATE, ADD_RANK1, ADAPTED_WEIGHT)


def operands(update: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Of an update in either spelling: y, then x or its feature sum, then the vector."""
    y, second, vector = update.args
    assert isinstance(y, fx.Node)
    assert isinstance(second, fx.Node)
    assert isinstance(vector, fx.Node)
    return y, second, vector


def module_path(node: fx.Node) -> str:
    """The qualified name of the innermost module whose call made the node.

    >>> from torch import nn
    >>> graph = fx.Graph()
    >>> node = graph.placeholder("x")
    >>> node.meta["nn_module_stack"] = {"a": ("L['self'].blocks[0]._modules['fc']", nn.Linear)}
    >>> module_path(node)
    'blocks.0.fc'
    """
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^[LG]\['[^']*'\]", "", path)  # Dynamo starts at a local or global variable
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    return ".".join(part for part in path.split(".") if part and part != "_orig_mod")


def source_line(node: fx.Node) -> str:
    """`file:line: code` of the innermost frame outside PyTorch and this package."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    for file, line, code in reversed(frames):
        if "/torch/" not in file and "/onelora_compile/" not in file:
            return f"{file}:{line}: {code}"
    return ""


def op_name(node: fx.Node) -> str:
    """What an op is called, whether as a function, a method or in aten; "" for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return "__matmul__" if target is operator.matmul else getattr(target, "__name__", "")


Use = tuple[str, fx.Node, fx.Node | None, tuple[int, ...]]  # kind, x, W, input axes of W from its end


def _use(gm: fx.GraphModule, node: fx.Node, chains: dict[fx.Node, Chain]) -> Use | None:
    """What the node multiplies; None for what is not a linear op."""
    if node.op == "call_module":
        called = gm.get_submodule(str(node.target))
        x = _argument(node, 0, "input", "x")
        linear = is_linear(called) or hasattr(called, "_onelora_base")
        return ("module", x, None, ()) if linear and x is not None else None
    name = op_name(node)
    if name in _LINEAR:
        x, weight = _argument(node, 0, "input"), _argument(node, 1, "weight")
        return ("linear", x, weight, (-1,)) if x is not None and weight is not None else None
    if name in _ADDMM:
        return _product(_argument(node, 1, "mat1", "batch1"), _argument(node, 2, "mat2", "batch2"), chains)
    if name in _MATMUL:
        return _product(_argument(node, 0, "input"), _argument(node, 1, "mat2", "other"), chains)
    if name in _GROUPED:
        x, weight = _argument(node, 0, "input", "mat_a"), _argument(node, 1, "weight", "mat_b")
        grouped = x is not None and weight in chains and _rank(weight) == 3
        return ("grouped", x, weight, (-2,)) if grouped and x is not None else None
    if name == "einsum":
        return _einsum(node, chains)
    if name in _CONV:
        x, weight = _argument(node, 0, "input"), _argument(node, 1, "weight")
        axes = tuple(range(-1 - int(name[4]), 0))
        return ("conv", x, weight, axes) if x is not None and weight in chains else None
    return None


def _product(left: fx.Node | None, right: fx.Node | None, chains: dict[fx.Node, Chain]) -> Use | None:
    """A matmul of an activation and a weight of at least two axes, on either side."""
    if left is None or right is None or (left in chains) == (right in chains):
        return None
    if right in chains:
        return ("matmul", left, right, (-2,)) if _rank(right) != 1 else None
    return ("left", right, left, (-1,)) if _rank(left) != 1 else None


def _einsum(node: fx.Node, chains: dict[fx.Node, Chain]) -> Use | None:
    equation, *rest = node.args
    parts = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    if not isinstance(equation, str) or len(parts) != 2 or not all(isinstance(part, fx.Node) for part in parts):
        return None
    first, second = parts
    if (first in chains) == (second in chains):
        return None
    x, weight = (first, second) if second in chains else (second, first)
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if (labels := einsum_labels(node, weight is first, _rank(x))) is None:
        return None
    of_x, of_weight, of_y = labels
    inputs = [label for label in of_weight if label not in of_y]
    plain = len(set(of_weight)) == len(of_weight) and len(set(of_x)) == len(of_x) and set(inputs) <= set(of_x)
    summed = set(of_x) - set(of_weight) - set(of_y)  # an axis of x that is summed away without a weight
    if not plain or not inputs or summed or not set(of_weight) - set(inputs) - set(of_x):
        return None
    axes = tuple(of_weight.index(label) - len(of_weight) for label in inputs)
    return ("einsum", x, weight, axes)


def einsum_labels(node: fx.Node, weight_first: bool, rank: int | None) -> tuple[str, str, str] | None:
    """The labels of x, W and the output, one letter for each axis; None where the equation does not give them.

    Args:
        node: the einsum.
        weight_first: whether W is the first operand.
        rank: how many axes x has, for an ellipsis; unknown counts as none under it.
    """
    equation = str(node.args[0]).replace(" ", "")
    left, arrow, of_y = equation.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2:
        return None
    of_x, of_weight = reversed(terms) if weight_first else terms
    if "..." in of_weight or ("..." in of_x) != ("..." in of_y):
        return None
    free = [letter for letter in string.ascii_letters if letter not in equation]
    covered = "".join(free[: rank - len(of_x.replace("...", ""))]) if rank is not None else ""
    return of_x.replace("...", covered), of_weight, of_y.replace("...", covered)


def conv_window(node: fx.Node, weight: torch.Tensor | None) -> tuple[list[int], list[int]] | None:
    """Kernel size and stride of a convolution that is a linear map of patches; None for any other."""
    if weight is None:
        return None
    space = weight.ndim - 2
    settings = []
    for position, (name, default) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)), 3):
        value: Any = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
        settings.append([value] * space if isinstance(value, int) else value)
    stride, padding, dilation, groups = settings
    window = list(weight.shape[2:])
    return (window, list(stride)) if conv_patches(window, stride, padding, dilation, groups[0]) else None


def conv_patches(window: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution of these settings maps every patch of the input linearly, none of them twice."""
    padding = (0,) if padding == "valid" else padding
    whole = prod(window) == 1 or list(stride) == list(window)
    return whole and all(p == 0 for p in padding) and all(d == 1 for d in dilation) and groups == 1


def _argument(node: fx.Node, position: int, *names: str) -> fx.Node | None:
    value: Any = node.args[position] if len(node.args) > position else None
    for name in names:
        value = node.kwargs.get(name, value)
    return value if isinstance(value, fx.Node) else None


def _rank(node: fx.Node | None) -> int | None:
    value = example(node) if node is not None else None
    return value.ndim if value is not None else None


def _linear_below(update: fx.Node) -> fx.Node | None:
    """The node whose output the update changes, seen through reshapes of the leading dimensions."""
    node: Any = operands(update)[0]
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in _VIEWS:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _sizes(
    gm: fx.GraphModule, node: fx.Node, kind: str, weight: fx.Node | None, axes: tuple[int, ...], x: fx.Node
) -> tuple[int | None, int | None]:
    """in_features and out_features, where they are known and static."""
    if node.op == "call_module":
        called = gm.get_submodule(str(node.target))
        return getattr(called, "in_features", None), getattr(called, "out_features", None)
    value = example(weight) if weight is not None else None
    if value is not None and kind != "linear":
        columns = [value.shape[axis] for axis in axes]
        rows = [size for axis, size in enumerate(value.shape) if axis - value.ndim not in axes]
        return _static(columns), _static(rows)
    sizes = []
    for tensor in (example(x), example(node)):
        size = tensor.shape[-1] if tensor is not None and tensor.ndim else None
        sizes.append(size if isinstance(size, int) else None)
    return sizes[0], sizes[1]


def _static(sizes: list[Any]) -> int | None:
    return prod(sizes) if all(isinstance(size, int) for size in sizes) else None
