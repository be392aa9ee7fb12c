"""Find the linear ops of an FX graph: what is multiplied with a parameter, and what adapts it.

    linear(x, W, c)                        F.linear, aten.linear, a call of a linear submodule
    addmm(c, x, W), x @ W, bmm(x, W)       a weight stored as [in_features, out_features], also of experts
    W @ x, addmm(c, W, x), mv(W, x)        a weight on the left: the features of x are its last axis but one
    einsum("bi,oi->bo", x, W)              where each axis of W is an input, an output, or common to all (experts)
    tensordot, inner, addbmm, linear(W, x) as the einsum that they are
    grouped_mm(x, W, offs)                 rows of x by expert
    conv(x, W, c)                          not a linear op of the paper, but a linear map

W may be a parameter or any view, slice or cast of one (`weight_chain`).  Only looks.  Leaves alone matmuls of two
activations, and embeddings.  Ops are told by identity (`op_names`), and read by their schema (`contractions`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterator
from math import prod
from typing import Any

import torch
from torch import fx

from onelora_compile.kinds import WRAPPED
from onelora_compile.ops import ADAPTED_WEIGHT, ADD_RANK1, RANK1_UPDATE
from onelora_compile.passes.sites.contractions import Contraction, use_of
from onelora_compile.passes.sites.einsum import Labels
from onelora_compile.passes.sites.weight_path import Chain, example, weight_chains

__all__ = ["LinearSite", "example", "match_linear", "module_path", "operands", "rank1_updates", "source_line"]

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
        alpha: what scales the product, a number or a node of one; not the output of `addmm` as a whole.
        fixed: why an update of the weight can't become one of the output; "" if it can.
        labels: of kind "einsum": one letter for each axis of x, W and the output; None where a rank is unknown.
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
    alpha: Any = 1
    fixed: str = ""
    labels: Labels | None = None

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

    Examples:
        >>> from torch import nn
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> [site.module for site in match_linear(gm)]
        ['0', '2']
    """
    updates = {_linear_below(update): update for update in rank1_updates(gm.graph)}
    chains = weight_chains(gm, parameters)
    sites = []
    for node in gm.graph.nodes:
        if (use := use_of(gm, node, chains)) is None:
            continue
        chain = chains.get(use.weight) if use.weight is not None else None
        columns, rows = _sizes(gm, node, use)
        sites.append(
            LinearSite(
                node=node,
                kind=use.kind,
                x=use.x,
                weight=use.weight,
                axes=use.axes,
                chain=chain,
                update=updates.get(node),
                module=module_path(node),
                in_features=columns,
                out_features=rows,
                source=source_line(node),
                alpha=use.alpha,
                fixed=use.fixed,
                labels=use.labels,
            )
        )
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
    return next(reversed(module_paths(node)), "")


def module_paths(node: fx.Node) -> list[str]:
    """The qualified names of all modules in whose call the node was made, outermost first."""
    if node.op == "call_module":
        return [str(node.target)]
    stack = node.meta.get("nn_module_stack") or {}
    return [plain_path(str(where)) for where, _ in stack.values()]


def plain_path(text: str) -> str:
    """The qualified name that an expression of Dynamo reaches a module or a parameter by.

    >>> plain_path("L['self']._modules['fc']._parameters['weight']")
    'fc.weight'
    """
    path = re.sub(r"^[LG]\['[^']*'\]", "", text)  # Dynamo starts at a local or global variable
    path = re.sub(r"\._(?:modules|parameters)\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    return ".".join(part for part in path.split(".") if part and part not in WRAPPED)


def source_line(node: fx.Node) -> str:
    """`file:line: code` of the innermost frame outside PyTorch and this package."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    for file, line, code in reversed(frames):
        if "/torch/" not in file and "/onelora_compile/" not in file:
            return f"{file}:{line}: {code}"
    return ""


def _linear_below(update: fx.Node) -> fx.Node | None:
    """The node whose output the update changes, seen through reshapes of the leading dimensions."""
    node: Any = operands(update)[0]
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in _VIEWS:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _sizes(gm: fx.GraphModule, node: fx.Node, use: Contraction) -> tuple[int | None, int | None]:
    """in_features and out_features, where they are known and static."""
    if node.op == "call_module":
        called = gm.get_submodule(str(node.target))
        return getattr(called, "in_features", None), getattr(called, "out_features", None)
    value = example(use.weight) if use.weight is not None else None
    if value is not None and use.kind != "linear":
        columns = [value.shape[axis] for axis in use.axes]
        rows = [size for axis, size in enumerate(value.shape) if axis - value.ndim not in use.axes]
        return _static(columns), _static(rows)
    sizes = []
    for tensor in (example(use.x), example(node)):
        size = tensor.shape[-1] if tensor is not None and tensor.ndim else None
        sizes.append(size if isinstance(size, int) else None)
    return sizes[0], sizes[1]


def _static(sizes: list[Any]) -> int | None:
    return prod(sizes) if all(isinstance(size, int) for size in sizes) else None
