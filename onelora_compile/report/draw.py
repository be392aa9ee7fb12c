"""A picture of a graph before and after the passes."""

from __future__ import annotations

import re
from pathlib import Path

from torch import fx

from onelora_compile.errors import ConfigError, require
from onelora_compile.ops import ADAPTED_WEIGHT, FEATURE_SUM
from onelora_compile.passes.lowerings import LOWERING
from onelora_compile.passes.sites.linear_site import is_update, match_linear, module_path
from onelora_compile.passes.sites.operators import op_name
from onelora_compile.weights.atomic_write import replacing

_COLOURS = {"linear": "#9ecae1", "sum": "#fdd0a2", "update": "#a1d99b", "input": "#ffffff", "": "#f0f0f0"}
_WIDTH, _HEIGHT = 2.4, 0.62  # inches of a column and of a row


def draw(before: fx.GraphModule, after: fx.GraphModule, path: Path, module: str | None) -> Path:
    """Write the picture; see `Explanation.draw`."""
    require("matplotlib", "demo", "draw a graph")
    from matplotlib.figure import Figure

    module = _first_block(before) if module is None else module
    panels = [_layout(gm, module) for gm in (before, after)]
    if not panels[0]:
        offered = sorted({module_path(node) for node in before.graph.nodes} - {""})
        raise ConfigError(f"no op of the graph belongs to a module {module!r}; its modules are {', '.join(offered)}")
    columns = [1 + max(x for x, _ in panel.values()) for panel in panels]
    rows = 1 + max(y for panel in panels for _, y in panel.values())
    figure = Figure(figsize=(_WIDTH * sum(columns), _HEIGHT * (rows + 2)))
    axes = figure.subplots(1, 2, width_ratios=columns)
    for axis, panel, gm, title in zip(axes, panels, (before, after), ("before", "after"), strict=True):
        kinds = _kinds(gm)
        for node, (x, y) in panel.items():
            for source in _visible_inputs(node, panel):
                start, end = panel[source], (x, y)
                arrow = {"arrowstyle": "-|>", "color": "#888888", "shrinkA": 11, "shrinkB": 11, "lw": 0.8}
                if end[1] - start[1] > 1:  # past other ops: around them
                    arrow["connectionstyle"] = "arc3,rad=-0.35"
                axis.annotate("", (end[0], -end[1]), (start[0], -start[1]), arrowprops=arrow, zorder=1)
            box = {"boxstyle": "round", "facecolor": _COLOURS[kinds.get(node, "")], "edgecolor": "#888888"}
            axis.text(x, -y, _label(node), ha="center", va="center", fontsize=8, bbox=box, zorder=2)
        axis.set(
            xlim=(-0.6, columns[panels.index(panel)] - 0.4), ylim=(-rows, 1), title=f"{module or 'graph'}: {title}"
        )
        axis.axis("off")
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix[1:] or "svg", bbox_inches="tight")
    return path


def _first_block(gm: fx.GraphModule) -> str:
    """The first module that is an element of a list of modules: 'blocks.0'; "" for a graph without any."""
    for node in gm.graph.nodes:
        if found := re.match(r"(.*?\.)?[A-Za-z_]\w*\.0(?=\.|$)", module_path(node)):
            return found.group(0)
    return ""


def _layout(gm: fx.GraphModule, module: str) -> dict[fx.Node, tuple[int, int]]:
    """Column and row of each op of the module: a row below everything that it reads."""
    chosen = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output") and _inside(n, module)]
    rows: dict[fx.Node, int] = {}
    taken: dict[int, int] = {}
    places: dict[fx.Node, tuple[int, int]] = {}
    for node in chosen:
        rows[node] = 1 + max((rows[source] for source in node.all_input_nodes if source in rows), default=-1)
        places[node] = (taken.get(rows[node], 0), rows[node])
        taken[rows[node]] = places[node][0] + 1
    return places


def _inside(node: fx.Node, module: str) -> bool:
    path = module_path(node)
    return not module or path == module or path.startswith(f"{module}.")


def _visible_inputs(node: fx.Node, panel: dict[fx.Node, tuple[int, int]]) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source in panel]


def _kinds(gm: fx.GraphModule) -> dict[fx.Node, str]:
    kinds = {site.node: "linear" for site in match_linear(gm)}
    for node in gm.graph.nodes:
        if is_update(node) or LOWERING in node.meta or node.target is ADAPTED_WEIGHT:
            kinds[node] = "update"
        elif node.target is FEATURE_SUM or op_name(node) == "sum":
            kinds[node] = "sum"
    return kinds


def _label(node: fx.Node) -> str:
    name = str(node.target) if node.op == "call_module" else op_name(node).strip("_")
    own = module_path(node).rpartition(".")[2]
    shape = getattr(node.meta.get("example_value"), "shape", None)
    sizes = "\n[" + ", ".join(map(str, shape)) + "]" if shape is not None else ""
    return f"{name}" + (f" ({own})" if own and own != name else "") + sizes
