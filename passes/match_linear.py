"""Find the linear ops of an FX graph, and for each the rank-1 update that adapts it.

    linear(x, W, c)            F.linear, aten.linear, a call of an nn.Linear submodule
    addmm(c, x, W), mm(x, W)   with W a parameter: a weight stored as [in_features, out_features]

Only looks. Leaves alone (1) matmuls of two activations: a matmul counts only where its right operand is a graph
input that Dynamo lifted from a parameter, or an attribute of the graph module; (2) convolutions, embeddings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from onelora_compile.layer import is_linear
from onelora_compile.ops import ADD_RANK1, RANK1_UPDATE

_LINEAR = {torch.nn.functional.linear, torch.ops.aten.linear.default, torch.ops.aten.linear}
_ADDMM = {torch.addmm, torch.ops.aten.addmm.default, torch.ops.aten.addmm}
_MATMUL = {torch.mm, torch.matmul, torch.ops.aten.mm.default, torch.ops.aten.matmul.default}
# Ops between a linear and its update that only change the leading dimensions.
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.reshape, "view", "reshape"}


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """One linear op in a graph and all that is known of it.

    Attributes:
        node: the linear op.
        x: its input [*, in_features].
        weight: the node that holds W; None for a call of a submodule.
        transposed: whether W is stored [in_features, out_features].
        update: the rank-1 update that adapts the op; None for a linear that is not adapted.
        module: qualified name of the module that made the call, as far as the graph tells; "" if it does not.
        in_features: columns of W, None where the graph has no shapes.
        out_features: rows of W, likewise.
        source: file, line and text of the user's code that made the call, "" if unknown.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    transposed: bool
    update: fx.Node | None
    module: str
    in_features: int | None
    out_features: int | None
    source: str

    @property
    def vector(self) -> fx.Node | None:
        """The node that holds the vector, None for a linear that is not adapted."""
        return None if self.update is None else operands(self.update)[2]


def match_linear(gm: fx.GraphModule) -> list[LinearSite]:
    """The linear sites of a graph in execution order; subgraphs of higher-order ops are not entered.

    Example:
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> [site.module for site in match_linear(gm)]
        ['0', '2']
    """
    updates = {_linear_below(update): update for update in rank1_updates(gm.graph)}
    sites = []
    for node in gm.graph.nodes:
        if (operands := _operands(gm, node)) is None:
            continue
        x, weight, transposed = operands
        sizes = _sizes(gm, node, x)
        path = module_path(node)
        sites.append(LinearSite(node, x, weight, transposed, updates.get(node), path, *sizes, source_line(node)))
    return sites


def rank1_updates(graph: fx.Graph) -> Iterator[fx.Node]:
    """The update nodes, in either spelling: vector in argument 2, output of the linear in argument 0."""
    return (node for node in graph.nodes if node.op == "call_function" and node.target in (RANK1_UPDATE, ADD_RANK1))


def operands(update: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Of an update in either spelling: y, then x or its feature sum, then the vector."""
    y, second, vector = update.args
    assert isinstance(y, fx.Node)
    assert isinstance(second, fx.Node)
    assert isinstance(vector, fx.Node)
    return y, second, vector


def example(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that the capture left on a node; Dynamo and export use different keys."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def module_path(node: fx.Node) -> str:
    """The qualified name of the innermost module whose call made the node.

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


def _operands(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node | None, bool] | None:
    """(x, W, whether W is stored transposed), or None for what is not a linear op."""
    if node.op == "call_module":
        called = gm.get_submodule(str(node.target))
        x = _argument(node, 0, "input", "x")
        return (x, None, False) if is_linear(called) and x is not None else None
    if node.op != "call_function":
        return None
    if node.target in _LINEAR:
        x, weight = _argument(node, 0, "input"), _argument(node, 1, "weight")
        return (x, weight, False) if x is not None else None
    if node.target in _ADDMM:
        x, weight = _argument(node, 1, "mat1"), _argument(node, 2, "mat2")
    elif node.target in _MATMUL:
        x, weight = _argument(node, 0, "input"), _argument(node, 1, "mat2", "other")
    else:
        return None
    if x is None or weight is None or not _is_parameter(weight):
        return None
    return x, weight, True


def _argument(node: fx.Node, position: int, *names: str) -> fx.Node | None:
    value: Any = node.args[position] if len(node.args) > position else None
    for name in names:
        value = node.kwargs.get(name, value)
    return value if isinstance(value, fx.Node) else None


def _is_parameter(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    # torch.export marks nothing on the node; its placeholders of parameters are named p_…
    return isinstance(example(node), nn.Parameter) or node.name.startswith("p_") or "_parameters_" in node.name


def _linear_below(update: fx.Node) -> fx.Node | None:
    """The node whose output the update changes, seen through reshapes of the leading dimensions."""
    node: Any = operands(update)[0]
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in _VIEWS:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _sizes(gm: fx.GraphModule, node: fx.Node, x: fx.Node) -> tuple[int | None, int | None]:
    if node.op == "call_module":
        called = gm.get_submodule(str(node.target))
        return getattr(called, "in_features", None), getattr(called, "out_features", None)
    sizes = []
    for value in (example(x), example(node)):
        size = value.shape[-1] if value is not None and value.ndim else None
        sizes.append(size if isinstance(size, int) else None)
    return sizes[0], sizes[1]
