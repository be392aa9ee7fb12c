"""The backend "onelora": match -> (insert) -> share -> fuse -> Inductor.

A graph of an adapted model holds its rank-1 updates already, since adapted modules call the operator, and its
vectors are graph inputs.  A model that nobody adapted is adapted here, at its first call; its graph, which Dynamo
has traced before that, gets the updates by the insert pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from onelora_compile import inductor
from onelora_compile.adapter import (
    AdapterState,
    adapt,
    adapted_weights,
    state_or_none,
    undo_adapt,
    vectors,
    was_adapted,
)
from onelora_compile.errors import ConfigError, OneLoRAWarning, StateError
from onelora_compile.layer import VECTOR, OneLoRALayer, vector_name
from onelora_compile.options import BackendOptions
from onelora_compile.passes.insert_rank1 import insert_rank1, insert_weight
from onelora_compile.passes.match_linear import LinearSite, is_update, match_linear
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.run import run_passes
from onelora_compile.passes.subgraphs import scopes
from onelora_compile.target import Target, targets_of, vector_key
from onelora_compile.targets import ALL_LINEAR, named_modules
from onelora_compile.text import shortened
from onelora_compile.watch import constant_inputs

Compiled = Callable[..., Any]

UNREADABLE = "linear ops that use a parameter without calling a module for it, in code that adapt could not follow"


def onelora_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a graph of Dynamo; what `torch.compile(model, backend="onelora")` calls.

    Args:
        gm: Dynamo's graph; not changed.
        example_inputs: its inputs.
        mode: Inductor's mode, as in `torch.compile`.
        options: see `BackendOptions`.

    Raises:
        ConfigError: an unknown option, or a lowering that no linear of the graph can take.
        TargetError: a model that was not adapted and has nothing to adapt.
        PassError: a pass failed.
    """
    checked = BackendOptions.parse(options)
    compiler = inductor.inner_compiler(checked.inner, mode, checked.inner_options)
    gm = inductor.copy_graph(gm)
    inserted = _adapt_on_first_call(gm, example_inputs, checked)
    _check_forced(run_passes(gm, lowering=checked.lowering), checked.lowering)
    compiled = compiler(gm, [*example_inputs, *inserted])
    return (lambda *args: compiled(*args, *inserted)) if inserted else compiled


def _check_forced(results: Sequence[PassResult], lowering: str | None) -> None:
    """A lowering that the user asked for and that was not taken is an error for all linears, a warning for some."""
    if lowering is None:
        return
    (fused,) = (result for result in results if result.name == "fuse_rank1")
    if fused.skips and len(fused.skips) == len(set(fused.rewrites) | set(fused.skips)):
        reasons = "; ".join(dict.fromkeys(fused.skips.values()))
        raise ConfigError(f"option lowering={lowering!r}: none of {len(fused.skips)} linears can take it: {reasons}")
    if fused.skips:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in list(fused.skips.items())[:6])
        warnings.warn(
            f"option lowering={lowering!r}: {len(fused.skips)} linears can't take it and get the default: {listed}",
            OneLoRAWarning,
            stacklevel=2,
        )


def _adapt_on_first_call(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions
) -> list[nn.Parameter]:
    """Adapt the models that the graph reads and that nobody adapted; return the vectors it needs as new inputs."""
    sources = inductor.frame_roots(gm, example_inputs)
    models = {root: inductor.compiled_module(root) for root in sources}
    fresh = {root: model for root, model in models.items() if not was_adapted(model)}
    if any(
        is_update(node) for graph in gm.modules() if isinstance(graph, fx.GraphModule) for node in graph.graph.nodes
    ):
        fresh = {}  # the frame reaches an adapted model through another one
    if fresh:
        _refuse_subgraphs(gm)
    for model in dict.fromkeys(fresh.values()):
        adapt(model, options.config)
    try:
        inserted = [vector for root in fresh for vector in _insert(gm, example_inputs, root, sources[root])]
    except StateError:
        for model in dict.fromkeys(fresh.values()):
            undo_adapt(model)
        raise
    for model in dict.fromkeys(fresh.values()):
        _announce(model)
    for model in dict.fromkeys(models.values()):
        if (state := state_or_none(model)) is not None:
            _note_constant_inputs(gm, example_inputs, state)
            _warn_about_the_rest(gm, example_inputs, model, state)
    return inserted


def _note_constant_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], state: AdapterState) -> None:
    """For the check after the first backward, which sees no values inside a compiled graph."""
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False))
    sites = ((site.module, site) for site in match_linear(gm) if site.update is not None)
    state.constant |= set(constant_inputs(sites, values.get))


def _insert(gm: fx.GraphModule, example_inputs: Sequence[Any], root: nn.Module, source: Any) -> list[nn.Parameter]:
    """Insert the updates of the weights that the graph uses under `root`; return their vectors in order."""
    names = {module: name for name, module in root.named_modules()}
    modules = {id(module): module for module in names}

    def name_of(site: LinearSite) -> str:
        # By the module that makes the call, not by the weight: weights can be shared, and a weight that another
        # module reads directly is not adapted there in eager either.
        module = inductor.calling_module(site.node, modules)
        return names[module] if isinstance(module, OneLoRALayer) else ""

    values = {name: module.onelora_vector for module, name in names.items() if isinstance(module, OneLoRALayer)}
    _, inputs = insert_rank1(gm, values, name_of)
    found = [(name, VECTOR, values[name]) for name in inputs]
    held = _parameter_inputs(gm, example_inputs)
    for module, name in names.items():
        for target in targets_of(module) if not isinstance(module, OneLoRALayer) else ():
            if (node := held.get(id(target.weight))) is not None and node.users:
                _refuse_shared(root, target)
                insert_weight(gm, node, target.vector, target.dims)
                found.append((name, vector_name(target.parameter), target.vector))
    inductor.mark_new_inputs(gm)
    for name, own, _ in found:
        inductor.guard_vector(source, name, own)
    return [vector for _, _, vector in found]


def _parameter_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, fx.Node]:
    """The graph inputs that are parameters, by the identity of the parameter."""
    pairs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)
    return {id(value): node for node, value in pairs if isinstance(value, nn.Parameter)}


def _refuse_subgraphs(gm: fx.GraphModule) -> None:
    """The insert pass adds graph inputs, which a subgraph of a higher-order op can't simply get."""
    for name, inner in gm.named_modules():
        if inner is not gm and isinstance(inner, fx.GraphModule) and match_linear(inner):
            raise StateError(
                f"the first graph has linears inside a higher-order op ({name}; activation checkpointing, torch.cond), "
                "where backend 'onelora' can't adapt a model at its first call: call onelora.adapt(model) before"
            )


def _refuse_shared(root: nn.Module, target: Target) -> None:
    """In the graph a shared weight is one input: which of its uses go through the adapted module can't be told."""
    holders = [name for name, module in root.named_modules() if any(p is target.weight for p in _own(module))]
    if len(holders) > 1:
        raise StateError(
            f"{target.parameter!r} is shared by {holders} and read directly: backend 'onelora' can't adapt it at the "
            "first call: call onelora.adapt(model) before"
        )


def _own(module: nn.Module) -> list[Any]:
    return list(module._parameters.values())


def _warn_about_the_rest(
    gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module, state: AdapterState
) -> None:
    """A linear op on a parameter that has no vector, and that no choice left out, is named, once."""
    if state.config.target_modules != ALL_LINEAR:
        return
    names: dict[int, str] = {}
    for name, module in named_modules(model):
        for parameter, value in module._parameters.items():
            names.setdefault(id(value), vector_key(name, parameter))
    held = {node: id_ for id_, node in _parameter_inputs(gm, example_inputs).items()}
    left_out = {*state.skipped, *state.not_linear, *state.originals}
    by_output = {name for name, target in adapted_weights(model).items() if target.called}
    rest: dict[str, str] = {}
    for scope, site in ((one, site) for one in scopes(gm) for site in match_linear(one.gm)):
        root = scope.outer.get(site.chain.root) if site.chain is not None else None
        name = names.get(held[root], "") if root in held else ""
        if name in by_output and f".{name}".endswith(f".{site.module}"):
            continue  # its own forward: the update is behind it
        if name and site.vector is None and name not in left_out and f"{name}.weight" not in left_out:
            rest[name] = site.source or site.node.name
    if rest:
        state.skipped |= dict.fromkeys(rest, UNREADABLE)
        places = "; ".join(f"{name!r} at {place}" for name, place in rest.items())
        warnings.warn(
            f"not adapted: {UNREADABLE}: {places}. Name them, with their input axis, in "
            "OneLoRAConfig(target_parameters={name: axis})",
            OneLoRAWarning,
            stacklevel=2,
        )


def _announce(root: nn.Module) -> None:
    adapted = vectors(root)
    entries = sum(vector.numel() for vector in adapted.values())
    warnings.warn(
        f"backend 'onelora' adapted {len(adapted)} linears of {type(root).__name__} ({entries} trainable numbers: "
        f"{shortened(adapted, 6)}) and froze everything else. Build the optimizer from "
        "onelora.trainable_parameters(model) now; "
        "call onelora.adapt(model, config) before torch.compile to choose the layers and to be rid of this warning",
        OneLoRAWarning,
        stacklevel=2,
    )
