"""The model that is exported, and what an adapter gives it: what every export asks first."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from onelora_compile.adapting.adapter import unwrap, vectors
from onelora_compile.adapting.adapter_state import adapted_part, adapted_weights, refuse_disabled
from onelora_compile.adapting.weight_target import vector_of
from onelora_compile.errors import ExportError, OneLoRAError, StateError
from onelora_compile.exporters.calls.axes import Axes
from onelora_compile.exporters.calls.signature import Call
from onelora_compile.exporters.jetson.device.core.modes import FOLD, Mode
from onelora_compile.exporters.onnx_file.trained import Trained, trained_of
from onelora_compile.exporters.to_program.capture import Frozen, VectorPlace, freeze
from onelora_compile.passes.exported.fold_vectors import FoldResult
from onelora_compile.weights.adapter_content import float32


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, and its adapter by the names that the adapter's file has, also where a wrapper holds the adapted part.

    Attributes:
        root: the model, not compiled.
        part: the name in it of the module that was given to `adapt`.
        adapted: that module.
        trained: heads and norms.
        values: float32, by name: of each vector, then of what is trained besides.
    """

    root: nn.Module
    part: str
    adapted: nn.Module
    trained: Trained
    values: dict[str, np.ndarray]

    @classmethod
    def of(cls, root: nn.Module, mode: Mode) -> Source:
        """What a model is made of.

        Raises:
            ExportError: a vector without a name in a mode that swaps by name.
        """
        part, adapted = adapted_part(root)
        trained = trained_of(root, part, adapted)
        values = {name: float32(vector) for name, vector in vectors(adapted).items()} | trained.values
        if mode is not FOLD and "" in values:
            raise ExportError(
                f"adapters={mode.name!r}: the {type(adapted).__name__} that was given to adapt is itself the adapted "
                "linear and its vector has no name to swap it by: adapt a module that holds it, for example "
                "torch.nn.Sequential(linear), or export with adapters='fold'"
            )
        return cls(root, part, adapted, trained, values)

    @property
    def prefix(self) -> str:
        """What stands before the names in the adapted part, in the whole model."""
        return f"{self.part}." if self.part else ""

    @property
    def replaced(self) -> dict[str, str]:
        """What replaces a base value as a whole: its name in the model, by its name in a program."""
        targets, values = self.trained.targets, self.trained.values
        return {target: self.prefix + name for target, name in targets.items() if name in values}

    @property
    def originals(self) -> dict[str, torch.Tensor]:
        """The tensors of the model but for its vectors, as they are."""
        return {name: value for name, value in self.root.state_dict().items() if vector_of(name) is None}

    def captured(
        self,
        call: Call,
        axes: Sequence[Axes],
        place: VectorPlace,
        dtype: torch.dtype | None = None,
        stored: torch.dtype | None = None,
    ) -> Frozen:
        """The program of a call, its vectors at a place.

        Args:
            call: example inputs.
            axes: dynamic axes of each tensor of the call.
            place: of the vectors.
            dtype: of the program, whose folded weights are rounded once; None is the model's own.
            stored: that folded weights will be stored in, for what is said of their rounding; None is the program's.

        Raises:
            ExportError: torch.export can't capture the model.
            OneLoRAError: a vector that can't be brought to its place.
        """
        originals = self.originals if dtype is not None else {}
        try:
            return freeze(_in_dtype(self.root, dtype), call, axes, place, originals, self.replaced, stored)
        except OneLoRAError:
            raise
        except Exception as error:  # torch.export raises what it likes, also the model's own exceptions
            raise ExportError(f"torch.export can't capture {type(self.root).__name__}: {error}") from error

    def named(self, result: FoldResult) -> FoldResult:
        """What became of the vectors, by the names that they have in the adapted part."""
        losses = {name.removeprefix(self.prefix): loss for name, loss in result.losses.items()}
        return dataclasses.replace(
            result, losses=losses, unused=[name.removeprefix(self.prefix) for name in result.unused]
        )


def exportable(model: nn.Module, mode: Mode, banked: bool = False) -> nn.Module:
    """The model itself, where it can be exported so.

    Args:
        model: plain or compiled.
        mode: where its vectors will be.
        banked: whether files bring the vectors.

    Raises:
        ExportError: it is a module of torch.jit, or holds one.
        StateError: a `disabled` block is open, or the mode needs vectors and there are none.
    """
    root = unwrap(model)
    refuse_disabled(root, "export")
    if (name := next((n for n, m in root.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)) is not None:
        which = f"its {name!r}" if name else f"this {type(root).__name__}"
        raise ExportError(
            f"can't export: {which} is a module of torch.jit (script, trace, load), whose code torch.export can't "
            "capture: export the model that it was made of"
        )
    if mode is not FOLD and not banked and not adapted_weights(root):
        raise StateError(f"adapters={mode.name!r} needs an adapted model: call adapt or load_adapter before")
    return root


def _in_dtype(root: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model, or a copy of it in another dtype whose vectors are as they were."""
    if dtype is None:
        return root
    converted = copy.deepcopy(root).to(dtype)
    kept = vectors(root)
    for name, vector in vectors(converted).items():
        vector.data = kept[name].detach().clone()
    return converted
