"""Which weights a module uses itself, without calling the module that holds them: `F.linear(x, self.w)`, `x @ self.w`.

Nobody can tell from a parameter whether it is the weight of a linear op, nor which of its axes are inputs; the code
can.  So the forward of a module that holds such parameters, or that reads a weight of a child, is traced symbolically
(`torch.fx`), on its own and without inputs, and the same matcher as for captured graphs finds the linear ops.  Where
the code depends on values, the trace follows one answer and then others, and keeps what it saw before it failed:
what it misses is found, and named in a warning, when a graph of the model is captured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from torch import nn

from onelora_compile.kinds import is_conv1d, is_linear
from onelora_compile.weight_uses.holders import of_torch
from onelora_compile.weight_uses.model_code import ModelCode
from onelora_compile.weight_uses.other_weights import parametrized
from onelora_compile.weight_uses.weight_reads import BOTH_WAYS, INSIDE, KEPT, READ, REPLACED, WRITTEN, DirectRead


@dataclasses.dataclass(frozen=True)
class WeightUses:
    """How the code of a model uses its weights.

    Attributes:
        reads: the weights that modules read themselves, each once.
        times: how often one forward of the model uses a weight, by a call of the linear or a read, where that is not
            once: at least, and with other arguments; by module and parameter.  Zero at most: never seen to.
        called: the linears that it calls.
        others: weights of linear ops that are no parameters of the model, by the module that holds them and their
            place there; with the reason why they have no vector.
    """

    reads: list[DirectRead]
    times: dict[tuple[nn.Module, str], tuple[int, int]]
    called: set[nn.Module]
    others: dict[tuple[nn.Module, str], str]


def weight_uses(model: nn.Module, called: Collection[nn.Module] = ()) -> WeightUses:
    """The weights that the modules of a model read themselves, and how often weights are used.

    Args:
        model: the model.
        called: modules that are linears as they are called, so that what they do inside is known.
    """
    found: dict[tuple[nn.Module, str], DirectRead] = {}
    code = ModelCode(model, called)
    linears = {id(module._parameters.get("weight")) for module in called}
    for module in model.modules():
        for read in code.reads(module):
            if module in called and read.module is module and read.own and read.why not in (WRITTEN, REPLACED):
                if read.parameter == "weight":
                    continue
                read = dataclasses.replace(read, dims=None, why=INSIDE)
            looked_up = isinstance(module, (nn.Embedding, nn.EmbeddingBag))  # by its own code, as the base's
            if read.why == READ and (looked_up or id(read.module._parameters[read.parameter]) not in linears):
                continue  # no weight of a linear op, as far as this tells
            key = (read.module, read.parameter)
            known = found.get(key)
            if known is None or read.why in KEPT or (known.dims is None and known.why not in KEPT and read.dims):
                found[key] = read
            elif None not in (known.dims, read.dims) and known.dims != read.dims:
                found[key] = dataclasses.replace(known, dims=None, why=BOTH_WAYS)
    reads = [*found.values(), *_by_other_names(model, found)]
    for module in model.modules():
        if module not in called and (isinstance(module, nn.MultiheadAttention) or not of_torch(module)):
            code.others |= parametrized(module)
    return WeightUses(reads, code.times(), code.calls(), code.others)


def _by_other_names(model: nn.Module, found: dict[tuple[nn.Module, str], DirectRead]) -> Iterator[DirectRead]:
    """The same reads of what shares a weight: a trace tells which parameter was read, not through which module.

    An embedding does not change with the linear that it shares its weight with, so what is read there stays.
    """
    reads = {id(read.module._parameters[read.parameter]): read for read in found.values()}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if (read := reads.get(id(weight))) is None or (module, name) in found:
                continue
            as_called = not is_linear(module) or read.dims in (None, (0,) if is_conv1d(module) else (1,))
            if as_called and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                yield dataclasses.replace(read, module=module, parameter=name)
