"""The tensors of PEFT's adapters as vectors, and back.

    LoRA    <path>.lora_A.weight [r, in_features], <path>.lora_B.weight [out_features, r]:  ΔW = alpha / r · B A
            (of a convolution, A has its window and B windows of 1); with r = 1 and A of ones, ΔW = B 1ᵀ
    MiSS    <path>.miss_block [r, out_features], and Bone, its older name, bone_block: with r = 1, ΔW = blockᵀ 1ᵀ
    saved   <path>.<parameter>, of modules_to_save
All with `base_model.model.` before the path; the name of an adapter may stand in it, as in `lora_A.default.weight`.

Source: PEFT 0.21, `peft/tuners/lora/layer.py`, `peft/tuners/miss/layer.py`, `peft/utils/save_and_load.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from onelora_compile.adapting.module_names import clean_name
from onelora_compile.errors import AdapterFileError, ConfigError
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_content import (
    CONV1D,
    CONVOLUTION,
    LINEAR,
    OTHERS,
    AdapterFile,
    Layer,
    Projection,
)
from onelora_compile.weights.fingerprint import Fingerprint
from onelora_compile.weights.peft_base_copies import without_base_copies
from onelora_compile.weights.peft_config import LORA, MISS, TASKS_WITH_HEADS, PeftConfig

PREFIX = "base_model.model."
_PARTS = re.compile(
    r"(?P<path>.+?)\.(?:(?P<factor>lora_[AB])(?:\.(?P<of>[^.]+))?\.weight"
    r"|(?P<block>(?:miss|bone)_block)(?:\.(?P<in>[^.]+))?)"
)
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save(?:\.(?P<of>[^.]+))?\.(?P<rest>[^.]+(?:\.[^.]+)*)")
# Tensors of PEFT that no vector holds.
_OTHERS = re.compile(r"(^|\.)(lora_|miss_|bone_|token_adapter|trainable_tokens_|base_layer\.|original_module\.)")


def to_peft(file: AdapterFile, peft_type: str) -> dict[str, Tensor]:
    """The tensors of a folder of PEFT: of LoRA r = 1, or of MiSS r = 1.

    Raises:
        ConfigError: an adapter that PEFT has no place for; it names what that is.
    """
    check_layers(file, peft_type, "PEFT", "peft")
    _check_saved(file)
    tensors: dict[str, Tensor] = {}
    for name, vector in file.vectors.items():
        if peft_type == MISS:
            tensors[f"{PREFIX}{name}.miss_block"] = vector.reshape(1, -1)
            continue
        inputs = file.layers[name].inputs
        assert inputs is not None
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.ones(1, *inputs, device="cpu")
        tensors[f"{PREFIX}{name}.lora_B.weight"] = vector.reshape(-1, *(1 for _ in inputs))
    return tensors | {f"{PREFIX}{name}": value for name, value in file.saved.items()}


def check_layers(file: AdapterFile, peft_type: str, reader: str, format: str) -> None:
    """Check that an adapter is on linears that the reader of a format can adapt.

    Args:
        file: the adapter.
        peft_type: LORA or MISS.
        reader: what messages call who reads it.
        format: of `save_adapter`.

    Raises:
        ConfigError: it is not, or does not say what it is on.
    """
    if absent := [name for name in file.vectors if name not in file.layers]:
        raise ConfigError(
            f"the adapter does not say what its vectors are on ({shortened(absent, 3)}): an older version or a "
            "runtime's format wrote it. Load it into the model, and save that: onelora.save_adapter(model, path, "
            f"format={format!r})"
        )
    reasons: dict[str, list[str]] = {}
    for name, layer in file.layers.items():
        if reason := _why_not(layer, peft_type):
            reasons.setdefault(reason, []).append(name)
    if reasons:
        listed = "; ".join(f"{shortened(names, 5)}: {reason}" for reason, names in reasons.items())
        raise ConfigError(
            f"{reader} has no place for {listed}. Adapt the model without these (exclude_modules), or keep this "
            "package's own format"
        )


def _check_saved(file: AdapterFile) -> None:
    if file.aliases:
        raise ConfigError(
            f"{shortened(file.aliases)} is tied to other parameters, which are trained with it; PEFT would train a "
            "copy. Leave it out of modules_to_save, or keep this package's own format"
        )


def _why_not(layer: Layer, peft_type: str) -> str:
    """Why PEFT has no layer for what a vector is on; "" where it has."""
    if layer.kind in OTHERS:
        return OTHERS[layer.kind]
    if peft_type == MISS and layer.kind != LINEAR:
        return f"{layer.kind}, which has no MiSS; LoRA has it (format='peft', --to peft)"
    if peft_type == LORA and layer.inputs is None:
        return "the size of the input is not known, which LoRA needs (load it into the model first, or take MiSS)"
    return ""


@dataclasses.dataclass(frozen=True)
class PeftTensors:
    """What the tensors of a folder say.

    Attributes:
        vectors: float32 [out_features], by module name.
        layers: what each is on, as far as the tensors tell.
        saved: what else was trained, by parameter or buffer name.
        roots: the modules that were trained as a whole.
        fingerprints: of base weights that lie beside the adapter.
        projection: what the vectors keep, if they are an approximation.
    """

    vectors: dict[str, Tensor]
    layers: dict[str, Layer]
    saved: dict[str, Tensor]
    roots: list[str]
    fingerprints: dict[str, Fingerprint]
    projection: Projection | None = None


def from_peft(config: PeftConfig, stored: Mapping[str, Tensor], path: Path, approximate: bool) -> PeftTensors:
    """Read the tensors of a folder.

    Args:
        config: of the same folder.
        stored: its tensors, by PEFT's keys.
        path: the file, for messages.
        approximate: take the best vector of each layer of a LoRA that is more than that.

    Raises:
        AdapterFileError: tensors that don't belong together, or that vectors can't hold.
    """
    parts, rest = _sorted_out(stored, path)
    if not parts:
        raise AdapterFileError(f"{path} holds no tensors of {config.peft_type}; it has {shortened(stored)}")
    rest, prints = without_base_copies(rest, parts)
    saved, roots = _saved(config, rest, path)
    if config.peft_type == LORA:
        vectors, layers, projection = _of_lora(config, parts, path, approximate)
        return PeftTensors(vectors, layers, saved, roots, prints, projection)
    vectors = {name: _of_block(config, name, tensors, path) for name, tensors in parts.items()}
    return PeftTensors(vectors, {name: Layer(LINEAR, None) for name in vectors}, saved, roots, prints)


def _sorted_out(stored: Mapping[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The factors of each module by its name, and all other tensors."""
    parts: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    adapters: set[str] = set()
    for key, value in stored.items():
        found = _PARTS.fullmatch(clean_name(key.removeprefix(PREFIX)))
        if found is None:
            rest[clean_name(key.removeprefix(PREFIX))] = value
            continue
        parts.setdefault(found["path"], {})[found["factor"] or found["block"]] = value
        adapters |= {one for one in (found["of"], found["in"]) if one}
    if len(adapters) > 1:
        raise AdapterFileError(f"{path} holds several adapters ({shortened(sorted(adapters))}): save each by itself")
    if inside := [name for name in parts if "base_layer" in name.split(".")]:
        raise AdapterFileError(
            f"{path} adapts what is inside of an adapted module ({shortened(inside)}), as PEFT does for "
            "nn.MultiheadAttention and for parameters: no vector holds that"
        )
    return parts, rest


def _saved(config: PeftConfig, rest: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """What modules_to_save holds, and the modules that this is of."""
    saved, roots, strange = {}, [], []
    for key, value in rest.items():
        found = _SAVED.fullmatch(key)
        name = f"{found['path']}.{found['rest']}" if found else key
        root = _root(config.modules_to_save, name)
        if root is None or _OTHERS.search(name):
            strange.append(key)
            continue
        saved[name] = value
        roots += [] if root in roots else [root]
    if strange:
        raise AdapterFileError(
            f"{path} holds {shortened(strange)}, which is neither a vector nor of modules_to_save "
            f"({shortened(config.modules_to_save)}): it would be lost"
        )
    heads = TASKS_WITH_HEADS.get(str(config.fields.get("task_type")), ())  # PEFT names all that such a task may have
    absent = [one for one in config.modules_to_save if one not in heads and not any(r.endswith(one) for r in roots)]
    if absent or (heads and config.modules_to_save and not any(r.endswith(heads) for r in roots)):
        raise AdapterFileError(f"{path} misses the tensors of modules_to_save: {shortened(absent or heads)}")
    return saved, roots


def _root(endings: Collection[str], name: str) -> str | None:
    """The outermost module of a tensor that modules_to_save names, by PEFT's rule."""
    names = name.split(".")
    modules = (".".join(names[:count]) for count in range(1, len(names)))
    return next((one for one in modules if one.endswith(tuple(endings))), None)


def _of_block(config: PeftConfig, name: str, tensors: Mapping[str, Tensor], path: Path) -> Tensor:
    """The vector of MiSS or Bone."""
    (key, block), *more = tensors.items()
    if more or key != f"{config.peft_type.lower()}_block":
        raise AdapterFileError(f"{path}: {name!r} has {shortened(tensors)}, for an adapter of {config.peft_type}")
    if block.ndim != 2 or len(block) != config.fields["r"] or not block.numel():
        raise AdapterFileError(
            f"{path}: the block of {name!r} is {list(block.shape)}; r={config.fields['r']} needs "
            f"[{config.fields['r']}, out_features]"
        )
    if len(block) != 1:
        raise AdapterFileError(
            f"{path} is {config.peft_type} of r={len(block)}: {len(block)} vectors for each layer, of which one could "
            "be kept. Train with r=1, which is the same map as this package's"
        )
    return block[0].to(torch.float32)


def _of_lora(
    config: PeftConfig, parts: Mapping[str, Mapping[str, Tensor]], path: Path, approximate: bool
) -> tuple[dict[str, Tensor], dict[str, Layer], Projection | None]:
    """The vectors of a LoRA; float64 arithmetic, rounded once."""
    vectors: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    kept: dict[str, tuple[float, float]] = {}
    exact, ranks = True, set()
    for name, tensors in parts.items():
        factors = _factors(config, name, tensors, path)
        ranks.add(len(factors[0]))
        a, b = (one.flatten(1).double() for one in factors)  # [r, in_features], [out_features, r]
        constant = a[:, :1]
        scaling = config.scaling(name, len(a))
        adding = (b * scaling).any(0)  # a row of A that B multiplies by zero, as at the start of training, adds nothing
        same = bool((a == constant)[adding].all())
        mean = constant if same else a.mean(1, keepdim=True)
        exact &= same
        vector = scaling * (b @ mean).flatten()
        vectors[name] = vector.to(torch.float32)
        inputs = tuple(factors[0].shape[1:])
        linear = CONV1D if config.fields.get("fan_in_fan_out") else LINEAR
        layers[name] = Layer(linear if len(inputs) == 1 else CONVOLUTION, inputs)
        # ‖B A‖² = tr(BᵀB AAᵀ), and ‖b 1ᵀ‖² = in_features ‖b‖²
        whole = scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())
        kept[name] = (a.shape[1] * float(vector @ vector), whole)
    if exact:
        return vectors, layers, None
    projection = _projection(kept)
    if not approximate:
        raise AdapterFileError(
            f"{path} is a LoRA of rank {', '.join(map(str, sorted(ranks)))} whose lora_A is not constant: vectors keep "
            f"{projection.text}, the rest would be lost. approximate=True of load_adapter and convert_adapter (onelora "
            "convert --approximate) takes the best vector of each layer"
        )
    return vectors, layers, projection


def _factors(config: PeftConfig, name: str, tensors: Mapping[str, Tensor], path: Path) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of a module, checked."""
    if set(tensors) != {"lora_A", "lora_B"}:
        absent = sorted({"lora_A", "lora_B"} - set(tensors))
        raise AdapterFileError(f"{path}: {name!r} has {shortened(tensors)}, and misses {shortened(absent)}")
    a, b = tensors["lora_A"], tensors["lora_B"]
    fits = a.ndim >= 2 and a.ndim == b.ndim and b.shape[1] == len(a) and b[0].numel() == len(a)
    if not fits or not a.numel() or not b.numel():
        raise AdapterFileError(
            f"{path}: lora_A of {name!r} is {list(a.shape)} and lora_B {list(b.shape)}; [r, in_features] and "
            "[out_features, r] belong together"
        )
    if len(a) != (rank := config.rank(name)):
        raise AdapterFileError(f"{path}: {name!r} is of rank {len(a)}; the configuration says {rank}")
    return a, b


def _projection(kept: Mapping[str, tuple[float, float]]) -> Projection:
    """Shares from squared norms, kept and whole; of a layer that was not trained nothing is lost."""
    layers = {name: min(1.0, own / whole) if whole else 1.0 for name, (own, whole) in kept.items()}
    whole = sum(one for _, one in kept.values())
    return Projection(layers, min(1.0, sum(own for own, _ in kept.values()) / whole) if whole else 1.0)
