"""What of a captured graph has no vector though nobody left it out: `adapt` could not follow the code that uses it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import fx, nn

from onelora_compile.adapting.adapter_state import AdapterState, adapted_weights
from onelora_compile.adapting.module_names import named_modules
from onelora_compile.adapting.select_targets import ALL_LINEAR
from onelora_compile.adapting.weight_target import vector_key
from onelora_compile.errors import OneLoRAWarning
from onelora_compile.passes.graph.subgraphs import Scope, scopes
from onelora_compile.passes.sites.linear_site import match_linear, module_paths, source_line
from onelora_compile.passes.sites.other_uses import ASK, other_uses
from onelora_compile.weight_uses.weight_reads import NOT_TOLD

UNREADABLE = "linear ops that use a parameter without calling a module for it, in code that adapt could not follow"


def warn_about_the_rest(
    gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module, state: AdapterState
) -> None:
    """Every parameter in a contraction that has no vector, and that no choice left out, is named, once.

    Args:
        gm: the graph, before any pass.
        example_inputs: its inputs.
        model: adapted; the graph uses its parameters.
        state: of the model; what is named here is in its summary from now on.
    """
    if state.config.target_modules != ALL_LINEAR:
        return
    names = _names(model)
    pairs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)
    held = {node: names[id(value)] for node, value in pairs if id(value) in names}
    targets = adapted_weights(model)
    skipped = [name for name, why in state.skipped.items() if NOT_TOLD not in why]
    left_out = {*skipped, *state.not_linear, *state.originals}
    whole = [*(name for name, target in targets.items() if target.called), *skipped, *state.not_linear]
    reasons: dict[str, str] = {}
    places: dict[str, str] = {}
    for scope in scopes(gm):
        inputs = {inner for inner, outer in scope.outer.items() if outer in held}
        for node, root, reason in _not_adapted(scope, inputs):
            name = held.get(scope.outer.get(root, root), "")
            known = name in left_out or f"{name}.weight" in left_out
            if name and not (
                known or _is_inside(node, name, whole) or (reason != UNREADABLE and _is_given(node, name))
            ):
                reasons[name] = reason
                places.setdefault(name, source_line(node) or node.name)
    if not reasons:
        return
    state.skipped |= reasons
    listed = (
        f"{reason.removesuffix(ASK)}: "
        + "; ".join(f"{name!r} at {places[name]}" for name, why in reasons.items() if why == reason)
        for reason in dict.fromkeys(reasons.values())
    )
    warnings.warn(
        f"not adapted: {'. And '.join(listed)}. Name them, with their input axis, in "
        "OneLoRAConfig(target_parameters={name: axis})",
        OneLoRAWarning,
        stacklevel=2,
    )


def _names(model: nn.Module) -> dict[int, str]:
    """What the vector of each parameter would be called, by its identity; the vectors are left out."""
    own = {id(target.vector) for target in adapted_weights(model).values()}
    names: dict[int, str] = {}
    for name, module in named_modules(model):
        for parameter, value in module._parameters.items():
            if value is not None and id(value) not in own:
                names.setdefault(id(value), vector_key(name, parameter))
    return names


def _not_adapted(scope: Scope, inputs: Collection[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node, str]]:
    """The uses of parameters that nothing adapts: the op, the node of the parameter, and what the use is."""
    for site in match_linear(scope.gm, inputs):
        if site.chain is not None and site.vector is None:
            yield site.node, site.chain.root, UNREADABLE
    for use in other_uses(scope.gm, inputs):
        yield use.node, use.root, use.reason


def _is_inside(node: fx.Node, name: str, whole: Collection[str]) -> bool:
    """Whether the op is part of the call of a module of `whole` that the parameter belongs to.

    What such a module computes is adapted behind its call, or known as a whole: a recurrent cell, a convolution.
    """
    owners = [f".{one}" for one in whole if name == one or name.startswith(f"{one}.")]
    return any(owner.endswith(f".{path}") for owner in owners for path in module_paths(node))


def _is_given(node: fx.Node, name: str) -> bool:
    """Whether the op is in a module that does not hold the parameter: there it is an input, as learned queries are."""
    path = next(reversed(module_paths(node)), "")
    return bool(path) and f".{path}." not in f".{name}."
