"""The backend "onelora": match -> share -> fuse -> Inductor.

A graph of an adapted model holds its rank-1 updates already, since adapted modules call the operator, and its
vectors are graph inputs.  A model that nobody adapted is adapted at its first call, which is not compiled: see
`first_call`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from onelora_compile.adapting.adapted_module import is_adapted
from onelora_compile.adapting.adapter import vectors
from onelora_compile.adapting.adapter_state import STATE, AdapterState, state_or_none, was_adapted
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.dead_vectors import constant_inputs
from onelora_compile.adapting.trained_besides import saved_tensors
from onelora_compile.backend.first_call import FirstCall
from onelora_compile.backend.name_the_rest import warn_about_the_rest
from onelora_compile.backend.options import BackendOptions
from onelora_compile.dynamo import frames, private_api
from onelora_compile.dynamo.frozen_weights import lift
from onelora_compile.errors import ConfigError, OneLoRAWarning
from onelora_compile.passes.graph.subgraphs import scopes
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.run import pipeline, run_passes
from onelora_compile.passes.sites.linear_site import is_update, match_linear

Compiled = Callable[..., Any]
AHEAD_OF_TIME = (
    "aot_compile with backend='onelora' got a model without vectors. No first call will adapt it: what is compiled is "
    "the base for good. Call onelora.adapt(model) before"
)


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
        PassError: a pass failed.
    """
    checked = BackendOptions.parse(options)
    compiler = private_api.inner_compiler(checked.inner, mode, checked.inner_options)
    gm = private_api.copy_graph(gm)
    if (first := _first_call(gm, example_inputs, checked.config)) is not None:
        return first.run
    changing = lift(gm, _travelling(gm, example_inputs))
    _check_forced(run_passes(gm, pipeline(checked.lowering)), checked.lowering)
    compiled = compiler(gm, [*example_inputs, *changing])
    return (lambda *args: compiled(*args, *changing)) if changing else compiled


def _travelling(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> set[int]:
    """What another adapter has other values of, by identity: of the models whose tensors the graph holds itself."""
    if not any(isinstance(getattr(gm, str(node.target), None), Tensor) for node in gm.graph.find_nodes(op="get_attr")):
        return set()
    found: list[Tensor] = []
    for model in map(frames.compiled_module, frames.frame_roots(gm, example_inputs)):
        if (state := state_or_none(model)) is not None:
            found += [*vectors(model).values(), *saved_tensors(model, state).values()]
    return {id(one) for one in found}


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


def _first_call(gm: fx.GraphModule, example_inputs: Sequence[Any], config: OneLoRAConfig) -> FirstCall | None:
    """What adapts the models that the graph reads and that nobody adapted; None where there is none."""
    sources = frames.frame_roots(gm, example_inputs)
    models = {root: _inside_data_parallel(frames.compiled_module(root)) for root in sources}
    # Where something in the graph is adapted, the models beside it are as their user wants them.
    chosen = any(is_update(node) for scope in scopes(gm) for node in scope.gm.graph.nodes)
    fresh = {} if chosen else {root: model for root, model in models.items() if not was_adapted(model)}
    if fresh:
        return _first_call_of(gm, fresh, sources, config)
    if not chosen and frames.is_ahead_of_time(gm) and any(True for _ in match_linear(gm)):
        warnings.warn(AHEAD_OF_TIME, OneLoRAWarning, stacklevel=2)
    for root, model in models.items():
        if not any(map(is_adapted, root.modules())):  # else a fresh model of the same class would run as the base
            source = sources[root]
            frames.guard_identity(frames.own_attribute(source, STATE) if STATE in vars(root) else source)
        if (state := state_or_none(model)) is not None:
            _note_constant_inputs(gm, example_inputs, state)
            warn_about_the_rest(gm, example_inputs, model, state)
    return None


def _inside_data_parallel(model: nn.Module) -> nn.Module:
    """What `adapt` puts its vectors on; DistributedDataParallel it refuses, and has to see."""
    return model.module if isinstance(model, nn.DataParallel) else model


def _first_call_of(
    gm: fx.GraphModule, fresh: Mapping[nn.Module, nn.Module], sources: Mapping[nn.Module, Any], config: OneLoRAConfig
) -> FirstCall:
    """For any fresh model of the class, where the frame is the model's own; else for these very modules, once.

    Were it always the latter, every new model would use up one of Dynamo's recompilations of the class.
    """
    models = list(dict.fromkeys(fresh.values()))
    if list(fresh) == models and len(models) == 1:
        if (find := frames.valid_without(sources[models[0]], STATE)) is not None:
            return FirstCall(gm, models, config, _note_constant_inputs, lambda: [find()], lambda: None)
    withdraw = frames.valid_once({root: sources[root] for root in fresh})
    refs = [weakref.ref(model) for model in models]  # Dynamo keeps the graph as long as the code of the class

    def present() -> list[nn.Module]:
        return [model for ref in refs if (model := ref()) is not None]

    return FirstCall(gm, models, config, _note_constant_inputs, present, withdraw)


def _note_constant_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], state: AdapterState) -> None:
    """For the check after the first backward, which sees no values inside a compiled graph."""
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False))
    sites = ((site.module, site) for site in match_linear(gm) if site.update is not None)
    state.constant |= set(constant_inputs(sites, values.get))
