"""Further vectors for a model that is adapted already: another adapter may be on other linears."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from onelora_compile.adapting.adapted_module import detach_vectors, is_adapted, vector_name
from onelora_compile.adapting.adapter import is_replicated, running_statistics, unwrap
from onelora_compile.adapting.adapter_state import AdapterState, adapted_weights
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.module_names import named_tensors
from onelora_compile.adapting.select_targets import Selection, select
from onelora_compile.adapting.torch_fast_paths import close_fast_paths
from onelora_compile.adapting.weight_target import Target, attach, targets_of
from onelora_compile.errors import StateError
from onelora_compile.printable import shortened


def select_on_base(root: nn.Module, config: OneLoRAConfig) -> Selection:
    """What a configuration means for the base of an adapted model.

    Raises:
        TargetError: as `select`.
    """
    with as_base(root):
        return select(root, config)


def extend(root: nn.Module, state: AdapterState, selection: Selection) -> None:
    """Give a model the vectors of a selection that it does not have yet, zeros; those that it has stay."""
    present = {(id(target.module), target.parameter) for target in adapted_weights(root).values()}
    new = {name: t for name, t in selection.targets.items() if (id(t.module), t.parameter) not in present}
    named = named_tensors(root)
    with torch.inference_mode(False), torch.no_grad():
        for name in [*selection.saved, *running_statistics(root, selection)]:
            if name not in state.originals:
                state.originals[name] = named[name].detach().clone()
        for name in selection.saved:
            named[name].requires_grad_(True)
        _attach(new, state)
    state.fast_paths += close_fast_paths(root)
    state.uses |= selection.uses
    state.made += [name for name in new if name not in state.made]  # in the place of a lost layer
    for name in new:
        state.skipped.pop(name, None)
        state.not_linear.pop(name, None)


def refuse_replicated(model: nn.Module, selection: Selection) -> None:
    """Check that no process of DistributedDataParallel would train further vectors, or heads and norms, by itself.

    Raises:
        StateError: the model got there as one in DistributedDataParallel, and would have more to train.
    """
    if not is_replicated(model):
        return
    root = unwrap(model)
    present, named = adapted_weights(root), named_tensors(root)
    new = [name for name in selection.targets if name not in present]
    if new := [*new, *(name for name in selection.saved if not named[name].requires_grad)]:
        raise StateError(
            f"DistributedDataParallel reduces the gradients that it knew when it was built, and the adapter trains "
            f"others: {shortened(new)}. Give the model all its adapters first, and wrap it then"
        )


def _attach(new: Mapping[str, Target], state: AdapterState) -> None:
    for module in dict.fromkeys(target.module for target in new.values()):
        own = [target for target in new.values() if target.module is module]
        before = targets_of(module)
        kept = {vector_name(target.parameter): target.vector for target in before}
        if before:
            detach_vectors(module)
        attach([*before, *own], state.config.vector_dtype)
        module._parameters.update(kept)


@contextlib.contextmanager
def as_base(root: nn.Module) -> Iterator[None]:
    """The modules without their vectors, for code that looks at what the base is."""
    changed = []
    for module in root.modules():
        if is_adapted(module):
            names = [vector_name(parameter) for parameter in module._onelora_weights]  # type: ignore[union-attr]
            changed.append((module, type(module), {name: module._parameters.pop(name) for name in names}))
            module.__class__ = module._onelora_base  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, adapted, vectors in changed:
            module.__class__ = adapted
            module._parameters.update(vectors)
