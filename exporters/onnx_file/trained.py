"""What an adapted model trains besides vectors, heads and norms, as exporters need it.

A vector is added to its weight; such a tensor takes the place of a base value.  Otherwise both are what an adapter
gives a model, and travel alike: as initializers, inputs, or rows of tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from onelora_compile.adapting.adapter import vectors
from onelora_compile.adapting.adapter_state import adapted_part, state_or_none
from onelora_compile.adapting.module_names import clean_name
from onelora_compile.adapting.trained_besides import saved_tensors
from onelora_compile.weights.adapter_content import digest, float32
from onelora_compile.weights.adapter_file import bases_of
from onelora_compile.weights.fingerprint import Fingerprint


@dataclasses.dataclass(frozen=True)
class Trained:
    """The trained tensors of an adapted model, by the names that an adapter file has.

    Attributes:
        values: float32, of floating tensors.
        originals: the base's values of the same.
        bases: fingerprints of these.
        counters: tensors of other dtypes, which no adapter moves in evaluation.
        targets: the names of all in an exported program, more than one of a tied parameter.
    """

    values: dict[str, np.ndarray]
    originals: dict[str, np.ndarray]
    bases: dict[str, Fingerprint]
    counters: dict[str, Tensor]
    targets: dict[str, str]

    def constants(self, program: ExportedProgram, placed: list[str]) -> dict[str, str]:
        """What the program does not take from an adapter, for `Metadata.constant`."""
        inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        read = {
            self.targets[spec.target]
            for spec in program.graph_signature.input_specs
            if spec.target in self.targets and inputs[spec.arg.name].users
        }
        found = {name: "" for name in self.values if name not in placed}
        for name, value in self.counters.items():
            found[name] = digest({name: value.cpu().numpy()}) if name in read else ""
        return found


def trained_of(root: nn.Module, part: str, adapted: nn.Module) -> Trained:
    """What is trained besides vectors.

    Args:
        root: the model that is exported.
        part: the name in it of the module that was given to `adapt`.
        adapted: that module.
    """
    state = state_or_none(adapted)
    if state is None:
        return Trained({}, {}, {}, {}, {})
    tensors = saved_tensors(adapted, state)
    floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
    names = {id(value): name for name, value in tensors.items()}
    everything = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    return Trained(
        values={name: float32(value) for name, value in floating.items()},
        originals={name: float32(state.originals[name]) for name in floating},
        bases=bases_of(state.originals),
        counters={name: value.detach() for name, value in tensors.items() if name not in floating},
        targets={clean_name(name): names[id(value)] for name, value in everything if id(value) in names},
    )


def other_values(
    shapes: Mapping[str, Sequence[int]],
    fingerprints: Mapping[str, Fingerprint],
    now: Mapping[str, np.ndarray],
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Values of another adapter of a model, float32 by name, of the size that one has; none is zero.

    Args:
        shapes: of what a model takes from an adapter, by name.
        fingerprints: of the base weight of each vector among them.
        now: what it takes from some adapter.
        generator: of the random numbers.
    """
    found = {}
    for name, shape in shapes.items():
        if (base := fingerprints.get(name)) is not None:
            size = 0.2 * base.norm / max(1, base.shape[0] * base.shape[1]) ** 0.5
            values = generator.normal(0, size or 1.0, shape)
        else:  # a variance stays positive
            size = float(np.sqrt(np.mean(np.square(now[name])))) or 1.0
            values = now[name] * generator.uniform(0.9, 1.1, shape) + 0.05 * size * generator.uniform(0.5, 1, shape)
        found[name] = values.astype(np.float32)
    return found


class Swapped:
    """An adapted model with the values of another adapter, for `torch.func.functional_call`; it is not changed.

    Args:
        model: adapted or not.
    """

    def __init__(self, model: nn.Module) -> None:
        part, adapted = adapted_part(model)
        trained, state = trained_of(model, part, adapted), state_or_none(adapted)
        self.held: dict[str, Tensor] = {**vectors(adapted)}
        self.base: dict[str, Tensor] = {name: torch.zeros_like(vector) for name, vector in self.held.items()}
        if state is not None:
            own = saved_tensors(adapted, state)
            self.held |= {name: value for name, value in own.items() if name in trained.values}
            self.base |= {name: value for name, value in state.originals.items() if name in trained.values}
        everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.names = {id(value): name for name, value in everything}

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """The model's parameters of an adapter, by their names in the model; what it does not name is the base's."""
        own = {
            name: torch.as_tensor(values.get(name, self.base[name]), device=one.device).to(one)
            for name, one in self.held.items()
        }
        return {self.names[id(self.held[name])]: value for name, value in own.items()}

    def other_values(
        self, shapes: Mapping[str, Sequence[int]], fingerprints: Mapping[str, Fingerprint]
    ) -> dict[str, np.ndarray]:
        """Values that no adapter has, of what is named, and the model's own of the rest; always the same ones."""
        now = {name: value.detach().float().cpu().numpy() for name, value in self.held.items()}
        return now | other_values(shapes, fingerprints, now, np.random.default_rng(0))
