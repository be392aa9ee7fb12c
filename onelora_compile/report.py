"""What is adapted, and how: `summary` of a model, `explain` of the graphs that it becomes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import fx, nn

from onelora_compile import inductor
from onelora_compile.adapter import adapted_weights, state_of, unwrap
from onelora_compile.config import OneLoRAConfig
from onelora_compile.passes.fuse_rank1 import LOWERING
from onelora_compile.passes.match_linear import LinearSite, match_linear
from onelora_compile.passes.run import run_passes
from onelora_compile.targets import named_modules, select
from onelora_compile.text import Printable, bytes_text


@dataclasses.dataclass(frozen=True)
class Summary(Printable):
    """The vectors of a model.

    Attributes:
        sites: module name, in_features and out_features of every adapted linear.
        skipped: every linear without a vector, with the reason.
        not_linear: convolutions and embeddings, which the method does not adapt, with what they are.
        vector_parameters: numbers in all vectors.
        other_parameters: trained besides, by modules_to_save and train_norms.
        base_parameters: numbers in the frozen base.
        vector_bytes: of the vectors in an adapter file (float32).
    """

    sites: list[tuple[str, int, int]]
    skipped: dict[str, str]
    not_linear: dict[str, str]
    vector_parameters: int
    other_parameters: int
    base_parameters: int
    vector_bytes: int

    @property
    def share(self) -> float:
        """Vectors over all parameters of the base, 0 to 1."""
        return self.vector_parameters / max(1, self.base_parameters)

    def __rich__(self) -> Group:
        table = Table(title="adapted linears")
        for column in ("module", "in_features", "out_features"):
            table.add_column(column, justify="left" if column == "module" else "right")
        for name, columns, rows in self.sites:
            table.add_row(name, str(columns), str(rows))
        lines = [f"{len(self.sites)} vectors, {self.vector_parameters:,} numbers, {bytes_text(self.vector_bytes)}: "]
        lines[0] += f"{self.share:.3%} of {self.base_parameters:,} base parameters"
        if self.other_parameters:
            lines.append(f"trained besides: {self.other_parameters:,} numbers (modules_to_save, train_norms)")
        for reasons in (self.skipped, self.not_linear):
            for reason in dict.fromkeys(reasons.values()):
                names = [name or "the model itself" for name, why in reasons.items() if why == reason]
                more = f", … ({len(names) - 6} more)" if len(names) > 6 else ""
                lines.append(f"no vector on {', '.join(names[:6])}{more}: {reason}")
        return Group(table, "\n".join(lines))


def summary(model: nn.Module) -> Summary:
    """What `adapt` did to a model; `print(summary(model))` shows it.

    Raises:
        StateError: the model is not adapted.
    """
    root = unwrap(model)
    state = state_of(root, "summarise", allow_disabled=True)
    targets = adapted_weights(root)
    entries = sum(target.vector.numel() for target in targets.values())
    everything = sum(parameter.numel() for parameter in root.parameters())
    trained = sum(parameter.numel() for parameter in root.parameters() if parameter.requires_grad)
    return Summary(
        sites=[(name, target.in_features, target.out_features) for name, target in targets.items()],
        skipped=dict(state.skipped),
        not_linear=dict(state.not_linear),
        vector_parameters=entries,
        other_parameters=trained - sum(t.vector.numel() for t in targets.values() if t.vector.requires_grad),
        base_parameters=everything - entries,
        vector_bytes=4 * entries,
    )


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One linear op of a captured graph.

    Attributes:
        graph: number of the graph, from 0.
        module: the module that makes the call.
        in_features: None where dynamic.
        out_features: likewise.
        adapted: whether a rank-1 update follows the op.
        lowering: how the update is made fast, "" without one.
        reason: why the op is not adapted, "" if it is.
        source: the user's line of code.
    """

    graph: int
    module: str
    in_features: int | None
    out_features: int | None
    adapted: bool
    lowering: str
    reason: str
    source: str


@dataclasses.dataclass(frozen=True)
class Explanation(Printable):
    """Every linear op of every graph that a call of the model becomes; `print` shows a table.

    Attributes:
        sites: the linear ops in order.
        graphs: how many graphs Dynamo made.
        breaks: why it broke off each graph but the last.
    """

    sites: list[SiteReport]
    graphs: int
    breaks: list[str]

    def __rich__(self) -> Group:
        table = Table(title="linear ops")
        for column in ("graph", "module", "in", "out", "adapted", "lowering, or why not", "source"):
            table.add_column(column, overflow="fold")
        for site in self.sites:
            row = (site.graph, site.module, site.in_features, site.out_features)
            what = site.lowering if site.adapted else site.reason
            file, _, rest = site.source.partition(":")
            place = f"{os.path.basename(file)}:{rest.partition(':')[0]}" if file else ""
            table.add_row(*map(str, row), "yes" if site.adapted else "no", what, place)
        adapted = sum(site.adapted for site in self.sites)
        text = f"{adapted} of {len(self.sites)} linear ops adapted, {self.graphs} graphs"
        return Group(table, "\n".join([text, *(f"graph break: {reason}" for reason in self.breaks)]))


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Capture a call as `torch.compile` does, run the passes, and report each linear op.

    The model is run once, without gradients, and not changed; one that is not adapted is explained as it is, with
    what the default configuration would adapt as the reason.
    """
    root = unwrap(model)
    graphs: list[fx.GraphModule] = []
    lowered: list[fx.GraphModule] = []

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(inductor.copy_graph(gm))
        lowered.append(inductor.copy_graph(gm))
        run_passes(lowered[-1])
        return gm.forward

    with torch.no_grad():
        torch.compile(root, backend=collect)(*args, **kwargs)
    reasons = _reasons(root)
    sites = [
        _report(index, site, graph_after, reasons)
        for index, (graph, graph_after) in enumerate(zip(graphs, lowered, strict=True))
        for site in match_linear(graph)
    ]
    return Explanation(sites, len(graphs), [str(why) for why in map(_break, graphs[:-1]) if why])


def _report(index: int, site: LinearSite, after: fx.GraphModule, reasons: dict[str, str]) -> SiteReport:
    lowering = ""
    if site.update is not None:
        fused = next((node for node in after.graph.nodes if _lowered_from(node, site)), None)
        lowering = fused.meta[LOWERING] if fused is not None else "composite operator"
    reason = "" if site.update is not None else reasons.get(site.module, "not a call of a linear module")
    adapted = site.update is not None
    return SiteReport(index, site.module, site.in_features, site.out_features, adapted, lowering, reason, site.source)


def _lowered_from(node: fx.Node, site: LinearSite) -> bool:
    vector = site.vector
    return LOWERING in node.meta and vector is not None and any(n.name == vector.name for n in node.all_input_nodes)


def _reasons(root: nn.Module) -> dict[str, str]:
    """Why each linear of the model has no vector, by module name."""
    if adapted_weights(root):
        return state_of(root, "explain", allow_disabled=True).skipped
    try:
        chosen = select(root, OneLoRAConfig())
    except ValueError as error:
        return {name: str(error) for name, _ in named_modules(root)}
    return chosen.skipped | dict.fromkeys(chosen.targets, "the model is not adapted; the default config would adapt it")


def _break(graph: fx.GraphModule) -> str | None:
    reason = getattr(graph, "compile_subgraph_reason", None)
    return getattr(reason, "reason", None)
