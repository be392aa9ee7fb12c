"""What the update of an output belongs to: the linear that made that output, seen through what changes no numbers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from onelora_compile.passes.sites.linear_site import LinearSite, example, operands
from onelora_compile.passes.sites.operators import op_name

_SAME_FEATURES = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "to",
    "_to_copy",
    "contiguous",
    "clone",
    "alias",
    "type_as",
    "detach",
}


def is_output_of(site: LinearSite) -> bool:
    """Whether the update is that of the site's weight: by the same input, last axis to last axis, not scaled."""
    assert site.update is not None
    plain = site.kind in ("linear", "matmul") and not site.fixed
    return plain and _source(operands(site.update)[1]) is _source(site.x) and not _is_scaled(site)


def addends(y: fx.Node) -> Iterator[fx.Node]:
    """What is added up to y and used for nothing else; seen through what changes neither features nor numbers."""
    name = op_name(y)
    parts = y.args[:1] if _is_same(y) or name == "sub" else y.args[:2] if name == "add" else ()
    if not parts or y.kwargs.get("alpha", 1) != 1:
        yield y
        return
    for part in parts:
        if isinstance(part, fx.Node) and _is_used_once(part) and _features(part) == _features(y):
            yield from addends(part)


def _is_same(node: fx.Node) -> bool:
    """Whether an op gives the numbers of its first argument, as a dropout does that drops nothing."""
    name = op_name(node)
    return name in _SAME_FEATURES or (name == "dropout" and node.args[2:] == (False,))


def _is_used_once(node: fx.Node) -> bool:
    """Whether one argument of one op is the node; what checks its dtype does not count."""
    readers = [user for user in node.users if op_name(user) != "_assert_tensor_metadata"]
    return len(readers) == 1 and [*readers[0].args].count(node) == 1


def _features(node: fx.Node) -> int | None:
    value = example(node)
    return value.shape[-1] if value is not None and value.ndim and value.is_floating_point() else None


def _is_scaled(site: LinearSite) -> bool:
    return not isinstance(site.alpha, (int, float)) or site.alpha != 1


def _source(x: fx.Node) -> fx.Node:
    """The node that an input comes from, seen through what changes neither its features nor its numbers."""
    while _is_same(x) and isinstance(x.args[0], fx.Node):
        before, now = example(x.args[0]), example(x)
        if before is None or now is None or before.shape[-1] != now.shape[-1] or not now.is_floating_point():
            break
        x = x.args[0]
    return x
