"""What becomes of each linear op of a call: `explain`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from torch import fx, nn

from onelora_compile.adapting.adapter import unwrap
from onelora_compile.adapting.adapter_state import adapted_weights, state_of
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.module_names import named_modules
from onelora_compile.adapting.select_targets import select
from onelora_compile.adapting.weight_target import vector_key
from onelora_compile.dynamo import private_api
from onelora_compile.dynamo.capture import capture
from onelora_compile.errors import ConfigError, TargetError
from onelora_compile.file_names import as_file
from onelora_compile.passes.graph.subgraphs import Scope, scopes
from onelora_compile.passes.lowerings import LOWERING
from onelora_compile.passes.open_attention import closed_sites, expand_attention
from onelora_compile.passes.run import run_passes
from onelora_compile.passes.sites.linear_site import LinearSite, match_linear, operands, rank1_updates
from onelora_compile.printable import Printable, shortened
from onelora_compile.report.draw import draw
from onelora_compile.table import Table, grouped

COMPUTED = "its weight is computed, not a parameter"
UNKNOWN = "in code that adapt could not follow: name it, with its input axis, in target_parameters"


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One linear op of a captured graph.

    Attributes:
        graph: number of the graph, from 0.
        module: the module that makes the call.
        name: of the vector that the weight has or would have; "" for a weight that is computed.
        in_features: None where dynamic.
        out_features: likewise.
        adapted: whether the op computes with W + b 1ᵀ.
        how: "module" if the module that is called adds the update, "weight" if the weight is handed out adapted.
        lowering: how the update is made fast, "" without one.
        why: why that lowering.
        reason: why the op is not adapted, "" if it is.
        source: the user's line of code.
    """

    graph: int
    module: str
    name: str
    in_features: int | None
    out_features: int | None
    adapted: bool
    how: str
    lowering: str
    why: str
    reason: str
    source: str

    @property
    def _row(self) -> tuple[str, ...]:
        """What a table shows of it beside its name."""
        chosen = f"{self.lowering}: {self.why}" if self.why else self.lowering
        how, what = (f"by its {self.how}", chosen) if self.adapted else ("no", self.reason)
        file, _, rest = self.source.partition(":")
        place = f"{os.path.basename(file)}:{rest.partition(':')[0]}" if file else ""
        return str(self.graph), str(self.in_features), str(self.out_features), how, what, place


@dataclasses.dataclass(frozen=True)
class Explanation(Printable):
    """Every linear op of every graph that a call of the model becomes; `print` shows a table.

    Attributes:
        sites: the linear ops in order, those inside higher-order ops after the graph around them.
        graphs: how many graphs Dynamo made.
        breaks: why it broke off each graph but the last.
        not_linear: convolutions and embeddings, which the method does not adapt, with what they are.
        captured: each graph before and after the passes.
    """

    sites: list[SiteReport]
    graphs: int
    breaks: list[str]
    not_linear: dict[str, str]
    captured: list[tuple[fx.GraphModule, fx.GraphModule]] = dataclasses.field(repr=False, compare=False)

    def __rich__(self) -> Group:
        table = Table(title="linear ops")
        for column in ("graph", "module", "in", "out", "adapted", "lowering, or why not", "source"):
            table.add_column(column)
        rows = ((site.name or site.module, site._row) for site in self.sites)
        for name, ((graph, *row), *_) in grouped(rows, alike=tuple).items():
            table.add_row(graph, name, *row)
        adapted = sum(site.adapted for site in self.sites)
        lines = [f"{adapted} of {len(self.sites)} linear ops adapted, {self.graphs} graphs"]
        for what in dict.fromkeys(self.not_linear.values()):
            names = [name for name, kind in self.not_linear.items() if kind == what]
            lines.append(f"{len(names)} x {what} ({shortened(grouped((name, None) for name in names), 3)})")
        return Group(table, "\n".join(lines + [f"graph break: {reason}" for reason in self.breaks]))

    def draw(self, path: str | os.PathLike[str], module: str | None = None, graph: int = 0) -> Path:
        """Draw one graph before and after the passes, as SVG, PNG or PDF by the ending of `path`.

        Args:
            path: the picture to write.
            module: only what this module computes; None is the first block of a model with blocks, else everything.
            graph: number of the graph.

        Raises:
            ConfigError: there is no such graph or module in it; the message lists the modules.
            MissingExtraError: matplotlib is not installed.
        """
        if not 0 <= graph < len(self.captured):
            raise ConfigError(f"there is no graph {graph}; the call became {len(self.captured)} graphs, from 0")
        return draw(*self.captured[graph], as_file(path, "path"), module)


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Capture a call as `torch.compile` does, run the passes, and report each linear op.

    The model is run once, without gradients.  It, its inputs, the random states and what is compiled already are not
    changed, and every call gives the same answer.  A model that is not adapted is explained as it is, with what the
    default configuration would adapt as the reason.
    """
    root = unwrap(model)
    captured: list[tuple[fx.GraphModule, fx.GraphModule]] = []
    weights: list[dict[fx.Node, str]] = []
    breaks: list[str] = []
    names = _parameter_names(root)

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        before = private_api.copy_graph(gm)
        for scope in scopes(before):
            expand_attention(scope.gm, everything=True)
        after = private_api.copy_graph(before)
        run_passes(after)
        captured.append((before, after))
        inputs = zip(before.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        weights.append({node: names[id(value)] for node, value in inputs if id(value) in names})
        breaks.append(private_api.break_reason(gm))
        return gm.forward

    capture(root, args, kwargs, collect)
    reasons, not_linear = _reasons(root)
    sites = []
    for index, (before, after) in enumerate(captured):
        for scope, lowered in zip(scopes(before), scopes(after), strict=True):
            for site in match_linear(scope.gm):
                report = _report(index, site, _name(site, scope, weights[index]), lowered.gm, reasons)
                if report.adapted or site.kind != "conv":  # other convolutions are in not_linear
                    sites.append(report)
            for site, why in closed_sites(scope.gm):
                report = _report(index, site, _name(site, scope, weights[index]), lowered.gm, reasons)
                sites.append(dataclasses.replace(report, why=why if report.adapted else ""))
    return Explanation(sites, len(captured), [reason for reason in breaks[:-1] if reason], not_linear, captured)


def _name(site: LinearSite, scope: Scope, weights: dict[fx.Node, str]) -> str:
    """What the vector of the op's weight is called."""
    root = scope.outer.get(site.chain.root) if site.chain is not None else None
    # A module that adds the update is known by its call: in the graph, shared weights are one input.
    if site.update is not None or root is None:
        return site.module if site.update is not None or site.kind == "module" else ""
    return weights.get(root, site.module)


def _report(index: int, site: LinearSite, name: str, after: fx.GraphModule, reasons: dict[str, str]) -> SiteReport:
    adapted = site.vector is not None
    how = "" if not adapted else "module" if site.update is not None else "weight"
    reason = ""
    if not adapted:
        computed = site.chain is None and site.kind != "module"
        reason = COMPUTED if computed else reasons.get(name, reasons.get(site.module, UNKNOWN))
    sizes = (site.in_features, site.out_features)
    lowering, why = _lowering(site, after) if adapted else ("", "")
    return SiteReport(index, site.module, name, *sizes, adapted, how, lowering, why, reason, site.source)


def _lowering(site: LinearSite, after: fx.GraphModule) -> tuple[str, str]:
    """What the passes made of the update of a site, and why."""
    below = operands(site.update)[0].name if site.update is not None else site.node.name
    for node in after.graph.nodes:
        choice = node.meta.get(LOWERING)
        if choice is not None and choice.of == below:
            return choice.name, choice.why
    left = any(operands(update)[0].name == below for update in rank1_updates(after.graph))
    return ("composite operator" if left or site.update is not None else "in the weight"), ""


def _parameter_names(root: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, module in named_modules(root):
        for parameter, value in module._parameters.items():
            names.setdefault(id(value), vector_key(name, parameter))
    return names


def _reasons(root: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Why each linear of the model has no vector, and what is no linear, by name."""
    if adapted_weights(root):
        state = state_of(root, "explain", allow_disabled=True)
        return state.skipped, state.not_linear
    try:
        chosen = select(root, OneLoRAConfig())
    except TargetError as error:
        return {name: str(error) for name, _ in named_modules(root)}, {}
    would = dict.fromkeys(chosen.targets, "the model is not adapted; the default config would adapt it")
    return chosen.skipped | would, chosen.not_linear
