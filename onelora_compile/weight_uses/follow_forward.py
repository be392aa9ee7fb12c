"""The graph of a module's code, followed with `torch.fx` and without values, in which no use of a parameter is hidden.

A parameter stands in the graph whoever holds it, and however the code comes by it: as an attribute of the module, of a
child or of a module that it only refers to, out of a list, bound to a function.  Submodules are not entered, nor are
functions of `torch.jit.script`; each is one node.  What another thread does meanwhile is not followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from onelora_compile.dynamo.fx_trace import following
from onelora_compile.looking.one_at_a_time import seen_here, silent
from onelora_compile.looking.outside import kept_outside
from onelora_compile.looking.unannounced import subclass
from onelora_compile.weight_uses.entries import Entry
from onelora_compile.weight_uses.followed_values import Uses
from onelora_compile.weight_uses.holders import Holders
from onelora_compile.weight_uses.replaced_functions import instead_of_torch
from onelora_compile.weight_uses.tracer import Inside, Tracer


@dataclasses.dataclass(frozen=True)
class Followed:
    """One way through some code.

    Attributes:
        gm: its graph.
        held: who holds each parameter of it, and its name there, by the target of its node.
        asked: how many answers the code asked for.
        error: what ended it early; "" if nothing did.
        size: what it took for sizes and numbers that only values could tell.
        guessed: whether it met one.
        replaced: the parameters in whose place the code put something else, and those that it put in such places.
    """

    gm: fx.GraphModule
    held: dict[str, tuple[nn.Module, str]]
    asked: int
    error: str
    size: int
    guessed: bool
    replaced: list[tuple[nn.Module, str]]


def follow(
    module: nn.Module,
    entry: Entry,
    values: int,
    answers: Sequence[bool],
    size: int,
    training: bool,
    holders: Holders,
    inside: Inside,
    entered: Collection[nn.Module] = (),
) -> Followed:
    """Follow some code of a module, as far as it goes.

    Args:
        module: whose code; the code may change what it reaches.
        entry: the code.
        values: how many arguments are given.
        answers: what each `if` on a value goes by; the last of them goes on.
        size: what a loop over a value goes by.
        training: the mode that the module is in.
        holders: of the model's parameters.
        inside: `held_in` the module.
        entered: submodules that are followed with it.
    """
    # A module of its own, as the class is another; what the code changes elsewhere is put back by `Kept`.
    names = "".join(f", value_{i}" for i in range(values))
    forward = eval(f"lambda self{names}: run(self{names})", {"run": entry.run})  # torch.fx reads the code object
    kind: Any = subclass(type(module).__name__, (type(module),), {"forward": forward})
    shadow = object.__new__(kind)
    shadow.__dict__.update(module.__dict__)
    shadow.__dict__["training"] = training
    for name in ("_parameters", "_buffers", "_modules"):
        shadow.__dict__[name] = dict(getattr(module, name))
    tracer, error = Tracer(answers, size, holders, inside, entered), ""
    try:
        # What it prints is about values that it lacks.
        with (
            silent("stdout", "stderr"),
            following(tracer.call_with, tracer.vmap),
            seen_here(torch, instead_of_torch(tracer)),
            kept_outside(),
            Uses(tracer),
        ):
            graph = tracer.trace(shadow)
    except (Exception, SystemExit) as failed:  # the user's code on values that it does not expect may raise anything
        error = f"{type(failed).__name__}: {failed}".partition("\n")[0]
        graph = tracer.graph
        graph.output(None)
    for node in graph.nodes:
        tracer.note(node)
    shadow.__dict__["_parameters"].update(tracer.parameters)
    held = {target: found for target, one in tracer.parameters.items() if (found := tracer.holder(one)) is not None}
    replaced = [(module if one is shadow else one, name) for one, name in tracer.replaced]
    return Followed(fx.GraphModule(shadow, graph), held, tracer.asked, error, size, tracer.guessed, replaced)
