"""A learning rate for each vector, by the sizes that its layer has in a batch: `parameter_groups`.

Adam moves each number of a vector by about its rate in a step, and so the output of the layer by rate * |feature sum|.
These sums differ by a factor of a thousand within one model.  With the rate times |output| / |feature sum| a step moves
each output by the same share of its size, and one rate does for all tasks that were tried: docs/evaluation.md.
The function of the model stays 1LoRA's, as this is a setting of the optimizer alone.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from onelora_compile.adapting.adapter import trainable_parameters, unwrap, vectors
from onelora_compile.adapting.adapter_state import state_of
from onelora_compile.dynamo import private_api
from onelora_compile.dynamo.capture import capture
from onelora_compile.errors import ConfigError, OneLoRAWarning, StateError
from onelora_compile.kinds import as_args, finite_number
from onelora_compile.ops import ADD_RANK1, accumulation_dtype, feature_sum
from onelora_compile.passes.move_updates import weight_to_activation
from onelora_compile.passes.open_attention import expand_attention
from onelora_compile.passes.run import run_passes
from onelora_compile.passes.sites.linear_site import operands, rank1_updates
from onelora_compile.printable import shortened

LARGEST = 1.0  # of the factors: sums that are nearly zero would have any rate. Those that were measured are below.


def parameter_groups(
    model: nn.Module, lr: float, batch: Tensor | Sequence[Any] | Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Groups for an optimizer of the Adam family, in which each vector has a learning rate of its own.

    The rate of a vector is `lr * min(1, |output| / |feature sum|)`, in root mean squares over the batch. The model is
    run once, in the mode that it is in, without gradients; it, the batch and the random states are as before.

    Args:
        model: adapted, plain or compiled.
        lr: 1e-2 was within 2 % of the best rate of each task that was tried.
        batch: of real data: the keyword arguments of a call, its arguments, or the one argument.

    Returns:
        A group for each vector, `{"params": [vector], "lr": rate, "name": name}`, and a last one, "others", at `lr`:
        heads and norms that are trained too. Schedules of an optimizer scale all of them.

    Raises:
        ConfigError: `lr` is no positive number; the batch uses none of the vectors, or gives NaN or infinity.
        StateError: the model is not adapted, or on the meta device.

    Warns:
        OneLoRAWarning: the batch does not use some vectors, or in a way that can't be measured; they get the median.
    """
    if (rate := finite_number(lr)) is None or rate <= 0:
        raise ConfigError(f"lr={lr!r} is no positive number")
    root = unwrap(model)
    state_of(root, "measure the sums of")
    own = vectors(root)
    if (name := next((name for name, vector in own.items() if vector.is_meta), None)) is not None:
        raise StateError(f"can't measure sums: {name!r} is on the meta device: load the model's weights first")
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (as_args(batch), {})
    sizes = _Sizes({_place(vector): name for name, vector in own.items()})
    capture(root, args, kwargs, sizes.watch)
    if wrong := [name for name, one in sizes.seen.items() if not math.isfinite(one.outputs + one.sums)]:
        raise ConfigError(f"the batch gives {shortened(wrong)} NaN, infinity or numbers near it: its sums have no size")
    factors = {name: one.factor for name, one in sizes.seen.items() if one.outputs}
    if not factors:
        raise ConfigError(
            "the batch uses none of the vectors, or in a way that can't be measured (outputs that are zero, vmap, a "
            "weight that is computed from others, code that Dynamo does not capture): give the inputs of a training "
            "step, or each vector a rate by hand"
        )
    if left := [name for name in own if name not in factors]:
        middle = statistics.median(factors.values())
        warnings.warn(
            f"{shortened(left)}: the batch does not use these vectors, or in a way that can't be measured, as outputs "
            f"that are zero. They get the median rate of the others, {rate * middle:.2g}",
            OneLoRAWarning,
            stacklevel=2,
        )
        factors |= dict.fromkeys(left, middle)
    groups: list[dict[str, Any]] = [
        {"params": [vector], "lr": rate * factors[name], "name": name} for name, vector in own.items()
    ]
    known = {id(vector) for vector in own.values()}
    others = [parameter for parameter in trainable_parameters(root) if id(parameter) not in known]
    return [*groups, {"params": others, "lr": rate, "name": "others"}] if others else groups


@dataclasses.dataclass
class _Size:
    """Sums of squares over all uses of a vector, and how many numbers they are of."""

    outputs: float = 0.0
    outputs_count: int = 0
    sums: float = 0.0
    sums_count: int = 0

    @property
    def factor(self) -> float:
        """The size of the output over that of the sum, at most `LARGEST`."""
        if not self.sums:
            return LARGEST
        return min(LARGEST, math.sqrt(self.outputs / self.outputs_count * self.sums_count / self.sums))


class _Sizes:
    """Measures what the updates of captured graphs get as they run.

    Dynamo runs one graph for several layers that are alike, so that only the run tells whose vector it is.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names  # of vectors, by where they are in memory
        self.seen: dict[str, _Size] = {}

    def watch(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """A backend that makes every adapted weight an update, and measures before each update."""
        watched = private_api.copy_graph(gm)
        run_passes(watched, (expand_attention, weight_to_activation))
        for module in watched.modules():
            if isinstance(module, fx.GraphModule):
                for update in rank1_updates(module.graph):
                    y, second, vector = operands(update)
                    measure = self.of_sums if update.target is ADD_RANK1 else self.of_inputs
                    with module.graph.inserting_before(update):
                        module.graph.call_function(measure, (_origin(vector), y, second))
                module.recompile()
        return watched.forward

    def of_inputs(self, vector: Tensor, y: Tensor, x: Tensor) -> None:
        """Note an update of y by the features of x."""
        self.of_sums(vector, y, feature_sum(x))

    def of_sums(self, vector: Tensor, y: Tensor, s: Tensor) -> None:
        """Note an update of y by feature sums."""
        if not y.numel() or any(map(private_api.is_of_a_transform, (vector, y, s))):  # under vmap there are no numbers
            return
        if (name := self._names.get(_place(vector))) is not None:
            size = self.seen.setdefault(name, _Size())
            size.outputs += _square(y)
            size.outputs_count += y.numel()
            size.sums += _square(s)
            size.sums_count += s.numel()


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=accumulation_dtype(values.dtype)).item() ** 2)


def _place(tensor: Tensor) -> int:
    """Where a tensor is in memory."""
    return tensor.data_ptr()


def _origin(node: fx.Node) -> fx.Node:
    """What a vector, or a part of one, is taken from: the input of the graph."""
    while node.op != "placeholder" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
