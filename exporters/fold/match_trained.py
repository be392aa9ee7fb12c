"""Where trained heads and norms go in an ONNX model: by name in our own exports, and else as `TrainedMatcher` finds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from onelora_compile.errors import ExportError
from onelora_compile.exporters.fold.find_weights import WeightUse, uses_of
from onelora_compile.exporters.fold.parameter_reads import ParameterRead, TrainedPlaces
from onelora_compile.exporters.fold.trained_matcher import TrainedMatcher
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_file import AdapterFile

if TYPE_CHECKING:
    import onnx_ir


def match_trained(
    model: onnx_ir.Model, file: AdapterFile, named: Iterable[tuple[str, WeightUse]], metadata: Metadata
) -> TrainedPlaces:
    """Find the place of everything that an adapter trained besides vectors.

    Args:
        model: of the adapter's base.
        file: the adapter.
        named: vectors that were found, with a use of each: how the model's names relate to the adapter's.
        metadata: of an export that carries trained tensors: there each has its name.

    Raises:
        ExportError: the export carries trained tensors that the adapter has no values for.
    """
    own = {name: model.graph.initializers[name] for name in metadata.trained}
    if absent := sorted(set(own) - set(file.saved)):
        raise ExportError(
            f"the model carries another adapter's trained values of {shortened(absent)}; this adapter leaves them as "
            "the base has them, and the model does not hold that: fold into an export of the base"
        )
    rest = {name: value for name, value in file.saved.items() if name not in own and name not in metadata.constant}
    renaming = _renaming(named)
    places = TrainedMatcher(model, dataclasses.replace(file, saved=rest), renaming).match() if rest else TrainedPlaces()
    places.reads |= {name: [ParameterRead(value, use, False) for use in uses_of(value)] for name, value in own.items()}
    return places


def _renaming(named: Iterable[tuple[str, WeightUse]]) -> tuple[str, str]:
    """What tools put before the names of the adapter, and what they cut off, as most vectors say."""
    votes: Counter[tuple[str, str]] = Counter()
    for name, use in named:
        for path in use.modules[-1:]:
            if path == name or path == name.rpartition(".")[0]:
                votes["", ""] += 1
            elif path.endswith(f".{name}"):
                votes[path.removesuffix(name), ""] += 1
            elif path and name.endswith(f".{path}"):
                votes["", name.removesuffix(path)] += 1
    return votes.most_common(1)[0][0] if votes else ("", "")
