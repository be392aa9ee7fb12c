"""Where an update stands: beside operators that Inductor writes itself, or beside kernels of a library.

Inductor puts a feature sum into the kernel that produces x, and an update into the one that consumes y, if it writes
those kernels: pointwise ops, norms, reductions.  Matmuls, attention and convolutions are calls of a library.
"""

from __future__ import annotations

from torch import fx

from onelora_compile.passes.sites.operators import op_name

_KERNELS = {
    "linear",
    "addmm",
    "baddbmm",
    "mm",
    "bmm",
    "matmul",
    "mv",
    "addmv",
    "addbmm",
    "inner",
    "tensordot",
    "einsum",
}
_KERNELS |= {"scaled_dot_product_attention", "conv1d", "conv2d", "conv3d", "grouped_mm", "_grouped_mm", "embedding"}
_VIEWS = {"view", "reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous"}
_VIEWS |= {"movedim", "getitem", "chunk", "split", "expand", "t", "_unsafe_view", "view_as", "mT", "T", "numpy_T"}


def stands_beside_kernel(node: fx.Node, above: bool) -> bool:
    """Whether the values of `node` come from (`above`) or go to a kernel of a library, seen through views.

    Inputs and outputs of the graph count as such: nothing there computes anything that could be fused with.
    """
    seen: set[fx.Node] = set()
    work = [node] if above else list(node.users)
    while work:
        one = work.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op in ("placeholder", "get_attr", "output") or op_name(one) in _KERNELS:
            return True
        if op_name(one) in _VIEWS:
            work += one.all_input_nodes[:1] if above else list(one.users)
    return False
