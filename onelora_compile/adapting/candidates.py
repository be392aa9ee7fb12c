"""What of a model is a linear op, or resembles one: the weight that could have a vector, or the reason why not."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from onelora_compile.adapting.adapted_module import Adapted
from onelora_compile.adapting.dispatched import without_hooks
from onelora_compile.adapting.probe_linear import linear_like, may_be_linear, weight_axes
from onelora_compile.adapting.weight_target import Target, calling, reading, targets_of, vector_key
from onelora_compile.kinds import CONVOLUTIONS, is_linear
from onelora_compile.passes.sites.contractions import conv_patches
from onelora_compile.weight_uses.trace_weight_uses import weight_uses
from onelora_compile.weight_uses.weight_reads import BOTH_WAYS, INSIDE, KEPT

TIED_EMBEDDING = "an embedding's weight, which a linear op reads too: the embedding would change with it"
BILINEAR = "a bilinear form of two inputs, not a linear op of the method"
RECURRENT = "its weights go to one kernel of a recurrent layer, which nothing can be added to"
EMBEDDING = "an embedding, not a linear op"
COMPLEX = "a complex weight; vectors and feature sums are real numbers"
CONVOLUTION = "a convolution, not a linear op of the method"
PATCHES = "a convolution, not a linear op of the method; it is a linear map of patches: name it in target_modules"
# What is not an op that was left out by choice.
NOT_LINEAR = (BILINEAR, EMBEDDING, CONVOLUTION, PATCHES)

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A weight that could be meant: its target, or why it has none; all names that a pattern may match.

    `uses` is how often a forward of the model uses it, at least and at most.
    """

    module: nn.Module
    names: list[str]
    target: Target | None
    reason: str = ""
    uses: tuple[int, int] = (1, 1)


def candidates_of(names: dict[nn.Module, list[str]], model: nn.Module) -> dict[str, Candidate]:
    """Everything that is or resembles a linear op, in the order of the modules, by the name of its vector."""
    with without_hooks(model):
        return _candidates_of(names, model)


def _candidates_of(names: dict[nn.Module, list[str]], model: nn.Module) -> dict[str, Candidate]:
    called = {module: _called(module) for module in names}
    read: dict[nn.Module, list[tuple[str, Target | None, str]]] = {}
    inside: dict[nn.Module, list[tuple[str, str]]] = {}  # of modules that are linears as they are called
    uses = weight_uses(model, {module for module, (target, _) in called.items() if target is not None})
    for found in uses.reads:
        module, dims, why = found.module, found.dims, found.why
        if isinstance(module, CONVOLUTIONS) or (dims is None and called[module][1] not in ("", *NOT_LINEAR)):
            continue  # known by its call
        own = called[module][0]
        if own is not None and found.parameter != own.parameter:
            inside.setdefault(module, []).append((found.parameter, why or INSIDE))
            continue
        across = why == BOTH_WAYS or (dims is not None and module in uses.called)
        if own is not None and (across or (dims is None and why not in KEPT)):
            if not own.dims:
                continue  # known by its call
            # What else reads the weight of a linear sees it adapted, as after a merge; transposed too.
            dims, why = own.dims, ""
        reason = TIED_EMBEDDING if isinstance(module, _EMBEDDINGS) else CONVOLUTION if found.convolution else why
        target = reading(module, found.parameter, dims) if dims and not reason else None
        read.setdefault(module, []).append((found.parameter, target, reason))
    result: dict[str, Candidate] = {}
    for module, aliases in names.items():
        if isinstance(module, Adapted):
            read[module] = [(target.parameter, target, "") for target in targets_of(module)]
        for parameter, own, why in read.get(module, ()):
            keys = [vector_key(alias, parameter) for alias in aliases]
            full = [f"{alias}.{parameter}".removeprefix(".") for alias in aliases]
            result[keys[0]] = Candidate(module, [*keys, *full, *aliases], own, why)
        if module not in read:
            own, why = called[module]
            if own is not None or why:
                result[aliases[0]] = Candidate(module, aliases, own, why)
            for parameter, why in inside.get(module, ()):
                result[vector_key(aliases[0], parameter)] = Candidate(module, [], None, why)
        _leave_out_complex(module, aliases, result, known=called[module] != (None, ""))
    for (module, place), why in uses.others.items():
        if called[module] == (None, ""):
            result.setdefault(f"{names[module][0]}.{place}".removeprefix("."), Candidate(module, [], None, why))
    embedded = {id(one.module.weight) for one in result.values() if one.reason == TIED_EMBEDDING}
    for key, candidate in result.items():
        if candidate.target is not None:
            often = uses.times.get((candidate.module, candidate.target.parameter), (1, 1))
            if id(candidate.module._parameters.get("weight")) in embedded:
                if often == (0, 0):  # it is never called: the embedding's own weight is read
                    candidate = dataclasses.replace(candidate, target=None, reason=TIED_EMBEDDING)
                often = (max(1, often[0]), 0)  # a file does not tell of which of the two it is read
            result[key] = dataclasses.replace(candidate, uses=often)
    return result


def _leave_out_complex(module: nn.Module, aliases: list[str], result: dict[str, Candidate], known: bool) -> None:
    """No vector for a complex weight. One that nothing was seen to read is named too, unless its module is `known`."""
    for name, parameter in module._parameters.items():
        if parameter is None or not parameter.is_complex():
            continue
        key = vector_key(aliases[0], name)
        if key in result and (result[key].target is not None or result[key].reason not in NOT_LINEAR):
            result[key] = dataclasses.replace(result[key], target=None, reason=COMPLEX)
        elif key not in result and parameter.ndim > 1 and not known:
            result[key] = Candidate(module, [key, *aliases], None, COMPLEX)


def _called(module: nn.Module) -> tuple[Target | None, str]:
    """The target of a module that is called, or why it has none; neither for a module that is no op of weights."""
    if isinstance(module, Adapted):
        return targets_of(module)[0], ""
    if isinstance(module, torch.jit.ScriptModule):
        return None, ""
    if is_linear(module):
        dims, reason = weight_axes(module)
        return (None, reason) if reason else (calling(module, dims), "")
    if isinstance(module, CONVOLUTIONS):
        patches = conv_patches(module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        if not patches or module._parameters.get("weight") is None:  # computed from others
            return None, CONVOLUTION
        return reading(module, "weight", range(1, module.weight.ndim)), PATCHES
    if isinstance(module, _EMBEDDINGS):
        return None, EMBEDDING
    if isinstance(module, nn.Bilinear):
        return None, BILINEAR
    if isinstance(module, nn.modules.conv._ConvNd):
        return None, CONVOLUTION
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None, RECURRENT
    if type(module).__module__.startswith("torch.ao.nn."):
        kind = type(module).__name__
        if kind.startswith(("LSTM", "GRU", "RNN")):
            return None, RECURRENT
        if kind.startswith("Embedding"):
            return None, EMBEDDING
    if may_be_linear(module):
        dims, reason = linear_like(module)
        return (None, reason) if reason else (calling(module, dims), "")
    return None, ""
