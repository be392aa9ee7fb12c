"""Adapter files: vectors, configuration and fingerprints of the base weights in one safetensors file.

Layout, format version 1
    tensors     `<module name>`               float32 [out_features], one per adapted weight; a parameter that is
                                              not called `weight` has its own name, one of experts [experts, out]
                `<parameter or buffer name>`  as trained: modules_to_save, norms, batch-norm statistics
    metadata    format = "onelora", format_version = "1", config, fingerprints (JSON), producer; saved_fingerprints,
                saved_aliases (JSON): of the base values of what is stored as trained, and the other names of tied ones;
                uses (JSON): how often one forward uses a weight, [at least, at most], where that may be more than once;
                older versions wrote none of these
A name is a vector's if and only if `fingerprints` holds it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from onelora_compile.adapting.adapter import (
    AdapterState,
    adapted_weights,
    attach_vectors,
    refuse_sharded,
    release,
    saved_tensors,
    state_of,
    undo_adapt,
    unwrap,
    vectors,
    was_adapted,
)
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.select_targets import Selection, available_targets, clean_name, select
from onelora_compile.adapting.weight_target import Target
from onelora_compile.errors import AdapterFileError, BaseMismatchError, ConfigError
from onelora_compile.file_names import as_path
from onelora_compile.printable import shortened
from onelora_compile.progress import over_weights
from onelora_compile.sharded import together, whole, write_whole
from onelora_compile.version import __version__
from onelora_compile.weights.atomic_write import replacing
from onelora_compile.weights.file_kinds import ADAPTER, FORMAT, refuse_other_kinds
from onelora_compile.weights.fingerprint import Fingerprint, fingerprint_of, fingerprint_of_values

FORMAT_VERSION = 1
Model = TypeVar("Model", bound=nn.Module)
PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file, checked.

    Attributes:
        config: with which the model was adapted.
        vectors: float32 [out_features] or [experts, out_features], by name.
        saved: what else was trained, by parameter or buffer name.
        fingerprints: of the base weight of each vector, by the same name.
        producer: the package and version that wrote it.
        bases: fingerprints of the values that `saved` had before training, of floating tensors; empty if an older
            version wrote the file.
        aliases: of trained parameters that are tied to others, the names of these.
        uses: how often one forward of the model uses a weight, at least and at most, where that may be more than once;
            at most 0 where there is no count: the sizes of inputs tell, and one use is of constants.
    """

    config: OneLoRAConfig
    vectors: dict[str, Tensor]
    saved: dict[str, Tensor]
    fingerprints: dict[str, Fingerprint]
    producer: str
    bases: dict[str, Fingerprint] = dataclasses.field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    uses: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that was trained, by name."""
        return self.vectors | self.saved


def save_adapter(model: nn.Module, path: PathLike) -> None:
    """Write the adapter to one safetensors file; an existing file is replaced in one step.

    Of a model that is sharded over processes (`fully_shard`) every process must call this; one writes the file.

    Raises:
        ConfigError: the path is that of a file of another kind: an ONNX model, the weights of a model.
        StateError: the model is not adapted, or a `disabled` block is open.
        AdapterFileError: a vector holds NaN or infinity (training diverged).
        OSError: the file can't be written; an old file is left as it was.
    """
    refuse_other_kinds(path, ADAPTER, "path")
    root = unwrap(model)
    state = state_of(root, "save")
    tensors = {name: whole(vector.detach()).to("cpu", torch.float32) for name, vector in vectors(root).items()}
    extra = {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in saved_tensors(root, state).items()}
    _check_finite(tensors | extra, "nothing was written: the training has diverged")
    targets = over_weights("fingerprint of the base", adapted_weights(root))
    prints = {name: fingerprint_of(target) for name, target in targets}
    tied = _tied(root, state)
    file = AdapterFile(state.config, tensors, extra, prints, "", bases_of(state.originals), tied, state.uses)
    with together(list(root.parameters()), Path(path)) as mine:
        if mine:
            with replacing(path) as beside:
                write_adapter(file, beside)


def bases_of(originals: Mapping[str, Tensor]) -> dict[str, Fingerprint]:
    """Fingerprints of what heads and norms were before training; counters have none."""
    return {name: fingerprint_of_values(value) for name, value in originals.items() if value.is_floating_point()}


def _tied(root: nn.Module, state: AdapterState) -> dict[str, tuple[str, ...]]:
    """The other names of trained parameters that are used in several places."""
    found: dict[str, tuple[str, ...]] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean_name(name))
    for name, value in saved_tensors(root, state).items():
        if others := tuple(one for one in names.get(id(value), ()) if one != name):
            found[name] = others
    return found


def write_adapter(file: AdapterFile, path: PathLike) -> None:
    """Write what an adapter file holds, to a path that nothing reads yet (`replacing`)."""
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "producer": f"onelora-compile {__version__}",
        "config": file.config.to_json(),
        "fingerprints": json.dumps({name: one.to_json() for name, one in file.fingerprints.items()}),
        "saved_fingerprints": json.dumps({name: one.to_json() for name, one in file.bases.items()}),
        "saved_aliases": json.dumps(file.aliases),
        "uses": json.dumps(file.uses),
    }
    save_file({name: tensor.contiguous() for name, tensor in file.tensors.items()}, path, metadata)


def load_adapter(model: Model, path: PathLike) -> Model:
    """Load an adapter file into a model; a compiled model is not compiled again.

    Of a model that is sharded over processes every process must call this, and can read the file. A model that is
    not adapted yet is adapted as the file says. Everything is checked before the first value is
    written: after an error the model is as it was.

    Returns:
        The same object.

    Raises:
        AdapterFileError: a damaged file, a newer format, other modules or shapes than the model's, NaN or infinity.
        BaseMismatchError: the adapter was trained on another base.
        StateError: a `disabled` block is open.
    """
    root = unwrap(model)
    file = read_adapter(path)
    fresh, new = not adapted_weights(root), not was_adapted(root)
    if fresh:
        refuse_sharded(root, "adapt", "load the adapter before fully_shard")
    state = attach_like(root, file, path) if fresh else state_of(root, "load")
    try:
        _check_fits(root, state, file, path)
    except Exception:
        if new:
            undo_adapt(root)  # a compiled call adapts it still
        elif fresh:
            release(root, state)
        raise
    current: dict[str, Tensor] = {**vectors(root), **saved_tensors(root, state)}
    with torch.inference_mode(False), torch.no_grad():
        for name, value in (file.vectors | file.saved).items():
            write_whole(current[name], value)
    return model


def read_adapter(path: PathLike) -> AdapterFile:
    """Read and check an adapter file by itself, without a model.

    Raises:
        AdapterFileError: not an adapter file, damaged, of a newer format version, or with NaN or infinity.
        FileNotFoundError: there is no such file.
    """
    path = as_path(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(metadata, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise AdapterFileError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    try:
        config = OneLoRAConfig.from_json(metadata["config"])
        raw = json.loads(metadata["fingerprints"])
        prints = {name: Fingerprint.from_json(fields) for name, fields in raw.items()}
        raw = json.loads(metadata.get("saved_fingerprints", "{}"))
        bases = {name: Fingerprint.from_json(fields) for name, fields in raw.items()}
        raw = json.loads(metadata.get("saved_aliases", "{}"))
        aliases = {name: tuple(map(str, others)) for name, others in raw.items()}
        uses = {name: (int(a), int(b)) for name, (a, b) in json.loads(metadata.get("uses", "{}")).items()}
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"{path}: damaged metadata: {error}") from error
    if missing := sorted(set(prints) - set(tensors)):
        raise AdapterFileError(f"{path}: the file names vectors that it does not hold: {shortened(missing)}")
    found = {name: tensors[name] for name in tensors if name in prints}
    for name, vector in found.items():
        if vector.ndim < 1 or vector.numel() != prints[name].shape[0] or vector.dtype != torch.float32:
            raise AdapterFileError(
                f"{path}: the vector of {name!r} is {vector.dtype} {list(vector.shape)}; its base weight of "
                f"{list(prints[name].shape)} needs torch.float32 [{prints[name].shape[0]}]"
            )
    if not found:
        raise AdapterFileError(f"{path} holds no vector")
    _check_finite(tensors, f"{path} was not loaded")
    saved = {name: tensor for name, tensor in tensors.items() if name not in prints}
    if strange := sorted(set(bases) - set(saved)):
        raise AdapterFileError(f"{path}: the file names trained tensors that it does not hold: {shortened(strange)}")
    return AdapterFile(config, found, saved, prints, metadata.get("producer", "unknown"), bases, aliases, uses)


def attach_like(root: nn.Module, file: AdapterFile, path: PathLike) -> AdapterState:
    """Adapt exactly the modules that the file has vectors for.

    Raises:
        AdapterFileError: the model has no linear of that name, or is laid out otherwise.
    """
    try:
        offered = available_targets(root, file.config)
    except ValueError as error:
        raise AdapterFileError(f"{path} does not fit {type(root).__name__}: {error}") from error
    if missing := [name for name in file.vectors if name not in offered]:
        raise AdapterFileError(
            f"{path} has vectors for linears that {type(root).__name__} does not have: {shortened(missing)}. "
            f"It has: {shortened(offered)}"
        )
    exact = dataclasses.replace(file.config, target_modules=list(file.vectors), exclude_modules=None)
    try:
        chosen = select(root, exact)
    except ValueError as error:
        raise AdapterFileError(f"{path} does not fit {type(root).__name__}: {error}") from error
    targets = {name: chosen.targets[name] for name in file.vectors}
    attach_vectors(root, Selection(targets, chosen.saved, chosen.skipped, chosen.not_linear, chosen.uses), file.config)
    return state_of(root, "load")


def _check_fits(root: nn.Module, state: AdapterState, file: AdapterFile, path: PathLike) -> None:
    targets = adapted_weights(root)
    current = saved_tensors(root, state)
    # A file that was an ONNX model's adapter in between has no counters, which say nothing to a model in evaluation.
    counted = {name for name, value in current.items() if not value.is_floating_point()} - set(file.saved)
    for what, here, there in (
        ("vectors", set(targets), set(file.vectors)),
        ("trained parameters", set(current) - counted, set(file.saved)),
    ):
        if here != there:
            raise AdapterFileError(
                f"{path} and the adapted model have different {what}. "
                f"Missing in the file: {shortened(sorted(here - there))}. "
                f"Missing in the model: {shortened(sorted(there - here))}. Detach the model and load again to take the "
                "file's selection"
            )
    for name, value in file.saved.items():
        if value.shape != current[name].shape:
            raise AdapterFileError(
                f"{path}: {name!r} is {list(value.shape)} in the file and {list(current[name].shape)} in the model"
            )
    check_base(targets, file, path)


def check_base(targets: dict[str, Target], file: AdapterFile, path: PathLike) -> None:
    """Whether an adapter was trained on these weights.

    Raises:
        AdapterFileError: a vector does not fit its weight.
        BaseMismatchError: other weights.
    """
    wrong = []
    for name, target in over_weights("check of the base", targets):
        expected, found = file.fingerprints[name], (target.out_features, target.in_features)
        if found != expected.shape or file.vectors[name].shape != target.shape:
            raise AdapterFileError(
                f"{path}: the vector {list(file.vectors[name].shape)} of {name!r} is for a weight of "
                f"{list(expected.shape)}; the model's is {list(found)} and takes {list(target.shape)}"
            )
        if not (here := fingerprint_of(target)).agrees(expected):
            wrong.append(f"{name} (differs by {here.distance(expected):.1%})")
    if wrong:
        raise BaseMismatchError(
            f"{path} was trained on another base: {len(wrong)} of {len(targets)} weights are not those it was trained "
            f"with: {shortened(wrong, 5)}. Load the base model that it was trained on (a merged or further trained "
            "model is another base)"
        )


def _check_format(metadata: dict[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT:
        raise AdapterFileError(
            f"{path} is a safetensors file, but not an adapter of onelora (metadata format={metadata.get('format')!r})"
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format version {version!r}; this onelora-compile {__version__} reads up to {FORMAT_VERSION}: "
            "upgrade it with pip install -U onelora-compile"
        )


def _check_finite(tensors: dict[str, Tensor], consequence: str) -> None:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterFileError(f"NaN or infinity in {shortened(bad)}; {consequence}")
