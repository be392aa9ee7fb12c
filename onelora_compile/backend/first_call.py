"""The first call of a compiled model that nobody adapted: it adapts the model, and is the base.

Dynamo has captured the graph of this call from the model as it was, and builds its guards on that after the backend
has returned.  So the model stays as it is during compilation, and is adapted when the graph runs.  For that one call
the graph gets the updates by the insert pass, so that the first backward reaches the vectors, and runs without
Inductor: Dynamo guards on types, and captures the next call anew.

    every use of W is the call of one adapted module      rank1_update behind the linear op
    W belongs to one module, whatever uses it             adapted_weight in front of everything that uses W
    anything else                                         the graph as it is, with the base's own gradients

The last is for weights that are shared and read, and modules that are adapted by their output alone.  All three give
the base's output, as the vectors are zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from onelora_compile.adapting.adapted_module import OneLoRALayer
from onelora_compile.adapting.adapter import adapt, undo_adapt, vectors
from onelora_compile.adapting.adapter_state import AdapterState, adapted_weights, state_of, was_adapted
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.dispatched import own_forward
from onelora_compile.adapting.module_names import clean_name
from onelora_compile.adapting.weight_target import Target
from onelora_compile.dynamo import frames, private_api
from onelora_compile.errors import OneLoRAWarning, StateError
from onelora_compile.kinds import is_conv1d
from onelora_compile.looking.one_at_a_time import LOOKING
from onelora_compile.passes.graph.subgraphs import scopes
from onelora_compile.passes.insert_updates import insert_rank1, insert_weight
from onelora_compile.passes.sites.linear_site import LinearSite, match_linear
from onelora_compile.printable import shortened

Note = Callable[[fx.GraphModule, Sequence[Any], AdapterState], None]

_CALLERS = (
    "onelora_callers"  # key in node.meta: the modules whose forward made the node, as (model, name), outermost first
)


class FirstCall:
    """Runs in place of a graph of models that nobody adapted."""

    def __init__(
        self,
        gm: fx.GraphModule,
        models: Sequence[nn.Module],
        config: OneLoRAConfig,
        note: Note,
        present: Callable[[], Sequence[nn.Module]],
        withdraw: Callable[[], None],
    ) -> None:
        """Keep what the call needs.

        Args:
            gm: the captured graph; its nodes are marked with the modules that made them.
            models: whose graph this is.
            config: what to adapt.
            note: told of the graph that ran, its inputs and the state of each model.
            present: at the call, the models to adapt: `models`, or others that the graph is valid for too.
            withdraw: called after the call.
        """
        mark_callers(gm, models)
        self.gm, self.config, self.note, self.present, self.withdraw = gm, config, note, present, withdraw
        self.is_part = frames.is_part_of_a_call()

    def run(self, *args: Any) -> Any:
        """Adapt the models and run the graph.

        Raises:
            TargetError: there is nothing to adapt.
            StateError: another thread has adapted and trained a model since this call was captured.
        """
        with LOOKING:
            models = self.present()
            adapted: list[nn.Module] = []
            try:
                for model in models:
                    if not was_adapted(model):
                        adapt(model, self.config)
                        adapted.append(model)
                gm, inserted, reasons = self.gm, list[nn.Parameter](), list[str]()
                if torch.is_grad_enabled() or len(adapted) < len(models):  # else the base's bits, nothing to train
                    gm, inserted, reasons = insert_updates(self.gm, args, models)
                with _as_before(models if gm is self.gm else ()):
                    result = gm(*args, *inserted)
            except BaseException:
                for model in adapted:
                    undo_adapt(model)
                raise
            for model in models:
                self.note(gm, args, state_of(model, "compile"))
            self.withdraw()
        for model in adapted:
            _announce(model, reasons, self.is_part and torch.is_grad_enabled())
        return result


def mark_callers(gm: fx.GraphModule, models: Sequence[nn.Module]) -> None:
    """Leave on every node the names of the modules that made it: the graph may run for another model of the class."""
    names = {
        str(id(module)): (number, name) for number, model in enumerate(models) for name, module in model.named_modules()
    }
    for scope in scopes(gm):
        for node in scope.gm.graph.nodes:
            ids = private_api.calling_modules(node)
            node.meta[_CALLERS] = [names[one] if one in names else None for one in ids]


@dataclasses.dataclass(frozen=True)
class _Use:
    """A weight that the graph uses: its input, the modules that hold it, and those of them that are adapted."""

    node: fx.Node
    holders: list[nn.Module]
    targets: list[tuple[str, Target]]


def insert_updates(
    gm: fx.GraphModule, args: Sequence[Any], models: Sequence[nn.Module]
) -> tuple[fx.GraphModule, list[nn.Parameter], list[str]]:
    """The graph with the updates of all adapted weights that it uses.

    Args:
        gm: a graph whose inputs are parameters, captured before the models were adapted; not changed.
        args: its inputs.
        models: adapted since.

    Returns:
        The graph, the vectors that are its further inputs, and no reasons; or `gm`, no vectors, and for each weight
        that can't take its update in this graph, why.
    """
    copy = private_api.copy_graph(gm)
    modules = {(number, name): module for number, model in enumerate(models) for name, module in model.named_modules()}
    sites = {site.node: site for site in match_linear(copy)}
    by_output: dict[fx.Node, tuple[str, Target]] = {}
    by_weight: list[tuple[_Use, Target]] = []
    reasons = _without_weight(copy, models, modules)
    for use in _uses(copy, args, models):
        if (found := _all_calls(use, sites, modules)) is not None:
            by_output |= found
        elif len(use.holders) == len(use.targets) == 1:
            by_weight.append((use, use.targets[0][1]))
        else:
            names = [name for name, _ in use.targets]
            reasons.append(f"{shortened(names)}: the weight is shared, and read without a call of its module")
    if reasons:
        return gm, [], reasons
    named = dict(by_output.values())
    _, inputs = insert_rank1(
        copy,
        {name: target.vector for name, target in named.items()},
        lambda site: by_output[site.node][0] if site.node in by_output else "",
    )
    inserted = [named[name].vector for name in inputs]
    for use, target in by_weight:
        assert target.dims  # of a weight that is a plain tensor
        insert_weight(copy, use.node, target.vector, target.dims)
        inserted.append(target.vector)
    copy.recompile()
    return copy, inserted, []


def _uses(gm: fx.GraphModule, args: Sequence[Any], models: Sequence[nn.Module]) -> list[_Use]:
    """The adapted weights among the inputs of the graph."""
    targets: dict[int, list[tuple[str, Target]]] = {}
    holders: dict[int, list[nn.Module]] = {}
    for name, target in _targets(models):
        if (weight := target.weight) is not None:
            targets.setdefault(id(weight), []).append((name, target))
    for model in models:
        for module in model.modules():
            for parameter in {id(parameter) for parameter in module._parameters.values() if parameter is not None}:
                holders.setdefault(parameter, []).append(module)
    inputs = zip(gm.graph.find_nodes(op="placeholder"), args, strict=True)
    return [_Use(node, holders[id(value)], targets[id(value)]) for node, value in inputs if id(value) in targets]


def _targets(models: Sequence[nn.Module]) -> list[tuple[str, Target]]:
    """The adapted weights with their names, which differ between models too."""
    numbered = [(f"{number}." if len(models) > 1 else "", model) for number, model in enumerate(models)]
    return [(prefix + name, target) for prefix, model in numbered for name, target in adapted_weights(model).items()]


def _all_calls(
    use: _Use, sites: Mapping[fx.Node, LinearSite], modules: Mapping[Any, nn.Module]
) -> dict[fx.Node, tuple[str, Target]] | None:
    """The linear ops that are calls of an adapted module, with its target; None if the weight has any other use.

    A use by another holder of the weight, which has no vector (an embedding that is tied to a linear), is the base's.
    """
    targets = {target.module: (name, target) for name, target in use.targets if _computes_one_linear(target)}
    adapted = {target.module for _, target in use.targets}
    calls: dict[fx.Node, tuple[str, Target]] = {}
    for user in use.node.users:
        caller = modules.get((user.meta.get(_CALLERS) or [None])[-1])
        if caller in targets and user in sites and sites[user].weight is use.node:
            calls[user] = targets[caller]
        elif caller in adapted or caller not in use.holders:
            return None
    return calls


def _computes_one_linear(target: Target) -> bool:
    """Whether a call of the module is one linear op of its weight, and nothing behind it but a reshape."""
    module = target.module
    plain = _kind(target).forward is nn.Linear.forward or is_conv1d(module)
    return target.called and plain and own_forward(module) is None and isinstance(module, OneLoRALayer)


def _kind(target: Target) -> Any:
    """The module's own class."""
    return getattr(target.module, "_onelora_base", type(target.module))


def _without_weight(gm: fx.GraphModule, models: Sequence[nn.Module], modules: Mapping[Any, nn.Module]) -> list[str]:
    """The modules in the graph that are adapted by their output alone: which node that is can't be told for sure."""
    called = {
        modules.get(caller)
        for scope in scopes(gm)
        for node in scope.gm.graph.nodes
        for caller in node.meta.get(_CALLERS, ())
    }
    return [
        f"{name or 'the model itself'}: {_kind(target).__name__} is adapted by its output alone"
        for name, target in _targets(models)
        if target.weight is None and target.module in called
    ]


@contextlib.contextmanager
def _as_before(models: Sequence[nn.Module]) -> Iterator[None]:
    """Models whose graph runs without the vectors: the base trainable as it was, so that a backward has a way to go."""
    for model in models:
        if any(vector.any() for vector in vectors(model).values()):
            raise StateError(
                f"{type(model).__name__} was adapted and trained by another thread while its first call was captured: "
                "call it again"
            )
    changed: list[tuple[nn.Parameter, bool]] = []
    for model in models:
        before = state_of(model, "compile").requires_grad
        for name, parameter in model.named_parameters(remove_duplicate=False):
            flag = before.get(clean_name(name), parameter.requires_grad)
            if parameter.requires_grad != flag:
                changed.append((parameter, parameter.requires_grad))
                parameter.requires_grad_(flag)
    try:
        yield
    finally:
        for parameter, flag in changed:
            parameter.requires_grad_(flag)


def _announce(model: nn.Module, reasons: Sequence[str], is_part: bool) -> None:
    adapted = vectors(model)
    entries = sum(vector.numel() for vector in adapted.values())
    way = (
        "The graph of this call was run as it is, since it can't take every vector "
        f"({shortened(reasons, 3)}): a backward of it gives them no gradients, the next call does. "
        if reasons
        else ""
    )
    if is_part:
        way += (
            "A graph break split this call: linears that ran before this graph were the base's, so a backward of it "
            "gives their vectors no gradients, and fails where they are checkpointed. To be rid of that, make the "
            "first call under torch.no_grad(). "
        )
    warnings.warn(
        f"backend 'onelora' adapted {len(adapted)} linears of {type(model).__name__} ({entries} trainable numbers: "
        f"{shortened(adapted, 6)}) and froze everything else. {way}Build the optimizer from "
        "onelora.trainable_parameters(model) now; "
        "call onelora.adapt(model, config) before torch.compile to choose the layers and to be rid of this warning",
        OneLoRAWarning,
        stacklevel=3,
    )
