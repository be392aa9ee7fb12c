"""What an adapter holds, whichever format its file has."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.text import Text
from torch import Tensor

from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.errors import AdapterFileError
from onelora_compile.printable import Printable, percent, shortened
from onelora_compile.weights.fingerprint import Fingerprint

# What a vector is on: a module that is called, and so has a layer in PEFT, or one of what has none, with the reason.
LINEAR, CONV1D, CONVOLUTION = "linear", "Conv1D", "convolution"
OTHERS = {
    "experts": "weights of experts in one parameter",
    "read": "a parameter that is read without a call of its module",
    "shared": "a module that is registered in several places, of which PEFT adapts one",
    "wrapped": "a part of a module that PEFT has wrapped",
    "root": "the model itself, not a module in it",
    "class": "a module of a class that PEFT has no layer for",
}
LAYER_KINDS = (LINEAR, CONV1D, CONVOLUTION, *OTHERS)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a vector is on.

    Attributes:
        kind: LINEAR, CONV1D (transformers' class), CONVOLUTION, or a key of OTHERS.
        inputs: the axes of one row of W: (in_features,), or (channels, *window) of a convolution; None where the file
            does not tell.
    """

    kind: str
    inputs: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Projection(Printable):
    """What the best vector of each layer keeps of a LoRA: b = ΔW 1 / in_features, the least squares for b 1ᵀ.

    Attributes:
        layers: the share of ‖ΔW‖² (Frobenius) that is kept, 0 to 1, by the name of the vector.
        total: the share of all layers together.
    """

    layers: dict[str, float]
    total: float

    @property
    def text(self) -> str:
        """The shares in one phrase."""
        low, high = min(self.layers.values()), max(self.layers.values())
        return f"{percent(self.total)} of ‖ΔW‖² in all, {percent(low)} to {percent(high)} per layer"

    def __rich__(self) -> Text:
        lines = [f"a vector keeps {self.text}"]
        lines += [f"  {percent(share, 2):>7}  {name}" for name, share in self.layers.items()]
        return Text("\n".join(lines), no_wrap=True, overflow="ignore")


@dataclasses.dataclass(frozen=True)
class Part:
    """An adapter in a sum of adapters (`combine`).

    Attributes:
        weight: by which it was multiplied.
        name: of its file, without the folder.
        digest: of its vectors, by `digest`.
        compared: whether its base was compared with the others', by fingerprints; true of a single one.
    """

    weight: float
    name: str
    digest: str
    compared: bool


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file, checked.

    Attributes:
        config: with which the model was adapted.
        vectors: float32 [out_features] or [experts, out_features], by name.
        saved: what else was trained, by parameter or buffer name.
        fingerprints: of the base weight of each vector, by the same name; without those that the file does not know,
            as of an adapter that PEFT has trained.
        producer: the package and version that wrote it.
        bases: fingerprints of the values that `saved` had before training, of floating tensors; empty if an older
            version wrote the file.
        aliases: of trained parameters that are tied to others, the names of these.
        uses: how often one forward of the model uses a weight, at least and at most: by the name of its vector, where
            that may be more than once, and of trained linears by the name of the weight; at most 0 where there is no
            count: the sizes of inputs tell, and one use is of constants. Negative where it is no bound: the sizes of
            inputs tell, or code was not followed.
        layers: what each vector is on; empty if an older version wrote the file, or it was a runtime's.
        base_model: the name or path that the base was loaded from; "" where nothing tells.
        task_type: PEFT's word for what the model does; "" where it has none, or nothing tells.
        projection: what vectors keep of the LoRA that this is an approximation of; None if it is none.
        parts: the adapters that this is the sum of; empty if it was trained.
    """

    config: OneLoRAConfig
    vectors: dict[str, Tensor]
    saved: dict[str, Tensor]
    fingerprints: dict[str, Fingerprint]
    producer: str
    bases: dict[str, Fingerprint] = dataclasses.field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    uses: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    layers: dict[str, Layer] = dataclasses.field(default_factory=dict)
    base_model: str = ""
    task_type: str = ""
    projection: Projection | None = None
    parts: tuple[Part, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that was trained, by name."""
        return self.vectors | self.saved

    @property
    def unknown(self) -> list[str]:
        """The vectors whose base weights the file does not know."""
        return [name for name in self.vectors if name not in self.fingerprints]

    def require_fingerprints(self, path: str | os.PathLike[str]) -> None:
        """Check that the file knows its base, for what finds or checks weights without the PyTorch model.

        Raises:
            AdapterFileError: it does not.
        """
        if self.unknown:
            raise AdapterFileError(
                f"{path} has no fingerprints of its base for {shortened(self.unknown, 3)}: PEFT keeps none. Load it "
                "into the base model and save it, onelora.load_adapter(model, path) and onelora.save_adapter(model, "
                "'a.safetensors'), and take that file"
            )


def digest(vectors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of vectors, as float32, and their names, in the order of names."""
    sha = hashlib.sha256()
    for name, vector in sorted(vectors.items()):
        sha.update(name.encode() + np.ascontiguousarray(vector, dtype="<f4").tobytes())
    return sha.hexdigest()


def float32(tensor: Tensor) -> Any:
    """The values of a vector as models and runtimes take them."""
    return tensor.detach().float().cpu().contiguous().numpy()


def check_finite(tensors: Mapping[str, Tensor], consequence: str) -> None:
    """Check the values of an adapter.

    Raises:
        AdapterFileError: NaN or infinity.
    """
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise AdapterFileError(f"NaN or infinity in {shortened(bad)}; {consequence}")


def check_vectors(
    vectors: Mapping[str, Tensor], fingerprints: Mapping[str, Fingerprint], path: str | os.PathLike[str]
) -> None:
    """Check the vectors of a file against the weights that it says they are for.

    Raises:
        AdapterFileError: another shape or dtype.
    """
    for name, vector in vectors.items():
        known = fingerprints.get(name)
        if vector.ndim < 1 or vector.dtype != torch.float32 or (known and vector.numel() != known.shape[0]):
            needs = f"its base weight of {list(known.shape)} needs" if known else "a vector is"
            raise AdapterFileError(
                f"{path}: the vector of {name!r} is {vector.dtype} {list(vector.shape)}; {needs} torch.float32 "
                f"[{known.shape[0] if known else 'out_features'}]"
            )
