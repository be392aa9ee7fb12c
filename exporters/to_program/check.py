"""Whether what computes a program computes what the model computes in eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onelora_compile.adapting.adapter_state import adapted_weights
from onelora_compile.errors import ExportError
from onelora_compile.exporters.calls.compare import Parity, badness, compare
from onelora_compile.exporters.calls.evaluating import evaluating
from onelora_compile.exporters.calls.signature import Call, outputs_of
from onelora_compile.exporters.onnx_file.trained import Swapped
from onelora_compile.exporters.to_program.source import Source
from onelora_compile.looking.process_flags import no_autocast
from onelora_compile.weights.fingerprint import fingerprint_of

Feed = Callable[[tuple[Tensor, ...], dict[str, Tensor]], list[Tensor]]  # positional and keyword inputs -> outputs


def check_program(
    feed: Feed, what: str, source: Source, call: Call, inputs: Mapping[str, str], outputs: Sequence[str]
) -> Parity:
    """Run something on the example inputs and the model in eager, and compare.

    Vectors that are inputs are compared with other values too: trained ones may be zero, and then a program that
    ignores them would pass.

    Args:
        feed: what is checked.
        what: it is, for messages.
        source: the model.
        call: of the model.
        inputs: the input of each vector, by its name in an adapter.
        outputs: names of what is returned.

    Returns:
        The parity of the worst output of the worst comparison.

    Raises:
        ExportError: it computes something else than the model, or can't be run.
    """
    found = []
    for which, parameters, vectors in _scenarios(source, inputs):
        with evaluating(source.root):
            outcome: Any = torch.func.functional_call(source.root, parameters, *call.fresh())
        args, kwargs = call.by_name([tensor.detach().clone() for tensor in call.tensors.values()])
        with no_autocast(), torch.no_grad():
            try:
                actual = feed(args, kwargs | vectors)
            except Exception as error:  # runtimes raise what they like
                raise ExportError(f"the {what} can't be run on the example inputs: {error}") from error
        parity = compare(list(outputs_of(outcome).values()), actual, outputs)
        if not parity.passed:
            raise ExportError(
                f"the {what} differs from {type(source.root).__name__} {which}: output {parity.output!r} by "
                f"{parity.relative:.1e} relative ({parity.absolute:.1e} absolute), {parity.tolerance:.0e} is allowed; "
                "nothing was written"
            )
        found.append(parity)
    return max(found, key=badness)


def _scenarios(source: Source, inputs: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """What to compare: how to call it, the parameters of the model for it, and the inputs of its vectors."""
    swapped = Swapped(source.root)
    yield "with its vectors", {}, {inputs[name]: swapped.held[name].detach() for name in inputs}
    if inputs:
        prints = {name: fingerprint_of(target) for name, target in adapted_weights(source.adapted).items()}
        other = swapped.other_values({name: tuple(swapped.held[name].shape) for name in inputs}, prints)
        held = {name: swapped.held[name] for name in inputs}
        values = {name: torch.as_tensor(other[name], device=one.device).to(one) for name, one in held.items()}
        yield "with other vectors", swapped.parameters(other), {inputs[name]: values[name] for name in inputs}
