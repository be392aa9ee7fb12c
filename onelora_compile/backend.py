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
from onelora_compile.adapter import adapt, vectors, was_adapted
from onelora_compile.errors import OneLoRAWarning, StateError
from onelora_compile.layer import is_adapted, vector_of
from onelora_compile.options import BackendOptions
from onelora_compile.passes.insert_rank1 import insert_rank1
from onelora_compile.passes.match_linear import LinearSite, match_linear, rank1_updates
from onelora_compile.passes.run import run_passes

Compiled = Callable[..., Any]


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
        ConfigError: an unknown option.
        TargetError: a model that was not adapted and has nothing to adapt.
        PassError: a pass failed.
    """
    checked = BackendOptions.parse(options)
    compiler = inductor.inner_compiler(checked.inner, mode, checked.inner_options)
    gm = inductor.copy_graph(gm)
    inserted = _adapt_on_first_call(gm, example_inputs, checked)
    run_passes(gm)
    compiled = compiler(gm, [*example_inputs, *inserted])
    return (lambda *args: compiled(*args, *inserted)) if inserted else compiled


def _adapt_on_first_call(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions
) -> list[nn.Parameter]:
    """Adapt the models that the graph reads and that nobody adapted; return the vectors it needs as new inputs."""
    if next(rank1_updates(gm.graph), None) is not None:
        return []
    sources = inductor.frame_roots(gm, example_inputs)
    fresh = {root: inductor.compiled_module(root) for root in sources}
    fresh = {root: model for root, model in fresh.items() if not was_adapted(model)}
    if fresh:
        _refuse_subgraphs(gm)
    for model in dict.fromkeys(fresh.values()):
        adapt(model, options.config)
        _announce(model)
    inserted = [vector for root in fresh for vector in _insert(gm, root, sources[root])]
    if fresh:
        _warn_about_direct_reads(gm, example_inputs, list(fresh))
    return inserted


def _insert(gm: fx.GraphModule, root: nn.Module, source: Any) -> list[nn.Parameter]:
    """Insert the updates of the linears that the graph calls under `root`; return their vectors in order."""
    names = {module: name for name, module in root.named_modules()}
    modules = {id(module): module for module in names}

    def name_of(site: LinearSite) -> str:
        # By the module that makes the call, not by the weight: weights can be shared, and a weight that another
        # module reads directly is not adapted there in eager either.
        module = inductor.calling_module(site.node, modules)
        return names[module] if module is not None and is_adapted(module) else ""

    values = {name: vector_of(module) for module, name in names.items() if is_adapted(module)}
    _, inputs = insert_rank1(gm, values, name_of)
    inductor.mark_new_inputs(gm)
    for name in inputs:
        inductor.guard_vector(source, name)
    return [values[name] for name in inputs]


def _refuse_subgraphs(gm: fx.GraphModule) -> None:
    """The insert pass adds graph inputs, which a subgraph of a higher-order op can't simply get."""
    for name, inner in gm.named_modules():
        if inner is not gm and isinstance(inner, fx.GraphModule) and match_linear(inner):
            raise StateError(
                f"the first graph has linears inside a higher-order op ({name}; activation checkpointing, torch.cond), "
                "where backend 'onelora' can't adapt a model at its first call: call onelora.adapt(model) before"
            )


def _warn_about_direct_reads(gm: fx.GraphModule, example_inputs: Sequence[Any], roots: Sequence[nn.Module]) -> None:
    """Linear ops that use an adapted module's weight without calling the module stay the base, as in eager."""
    adapted = (module for root in roots for module in root.modules() if is_adapted(module))
    weights = {id(module.weight) for module in adapted}
    held = {
        node
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)
        if id(value) in weights
    }
    direct = [site for site in match_linear(gm) if site.update is None and site.weight in held]
    if direct:
        places = ", ".join(site.source or site.node.name for site in direct)
        warnings.warn(
            f"not adapted: linear ops that read the weight of an adapted module without calling it: {places}",
            OneLoRAWarning,
            stacklevel=2,
        )


def _announce(root: nn.Module) -> None:
    adapted = vectors(root)
    entries = sum(vector.numel() for vector in adapted.values())
    listed = ", ".join(list(adapted)[:6]) + (", …" if len(adapted) > 6 else "")
    warnings.warn(
        f"backend 'onelora' adapted {len(adapted)} linears of {type(root).__name__} ({entries} trainable numbers: "
        f"{listed}) and froze everything else. Build the optimizer from onelora.trainable_parameters(model) now; "
        "call onelora.adapt(model, config) before torch.compile to choose the layers and to be rid of this warning",
        OneLoRAWarning,
        stacklevel=2,
    )
