"""Adapter files: vectors, configuration and fingerprints of the base weights in one safetensors file.

Layout, format versions 1 and 2
    tensors     `<module name>`               float32 [out_features], one per adapted weight; a parameter that is
                                              not called `weight` has its own name, one of experts [experts, out]
                `<parameter or buffer name>`  as trained: modules_to_save, norms, batch-norm statistics
    metadata    format = "onelora", format_version, config (JSON), and what `adapter_metadata.py` lists; older versions
                wrote no more than fingerprints and producer of that
A name is a vector's if and only if `fingerprints` holds it. Version 2 is written where a fingerprint is not known (an
adapter of PEFT that was converted without its base), which version 1 could not say.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
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
from onelora_compile.adapting.select_targets import (
    Selection,
    available_targets,
    named_modules,
    select,
)
from onelora_compile.errors import AdapterFileError, OneLoRAWarning, one_of
from onelora_compile.file_names import as_path
from onelora_compile.printable import shortened
from onelora_compile.progress import over_weights
from onelora_compile.sharded import together, whole, write_whole
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_content import AdapterFile as AdapterFile
from onelora_compile.weights.adapter_content import check_finite, check_vectors
from onelora_compile.weights.adapter_metadata import DAMAGED, base_to_metadata, parsed_base
from onelora_compile.weights.atomic_write import replacing
from onelora_compile.weights.file_kinds import ADAPTER, FORMAT, refuse_other_kinds
from onelora_compile.weights.fingerprint import Fingerprint, fingerprint_of, fingerprint_of_values
from onelora_compile.weights.fits_model import check_model, left_to_the_base, tied_names, unchecked
from onelora_compile.weights.layers import base_model_of, layers_of, task_type_of, whole_modules
from onelora_compile.weights.peft_folder import PEFT_FORMATS, read_folder, refuse_other_folders, write_folder

FORMAT_VERSION = 2
Model = TypeVar("Model", bound=nn.Module)
PathLike = str | os.PathLike[str]
ONELORA = "onelora"  # the format of save_adapter that is a file


def save_adapter(model: nn.Module, path: PathLike, format: str = ONELORA) -> None:
    """Write the adapter to one safetensors file, or as a folder of PEFT; an existing one is replaced in one step.

    Of a model that is sharded over processes (`fully_shard`) every process must call this; one writes the file.

    Args:
        model: the adapted model.
        path: the file, or the folder for PEFT.
        format: "onelora" is this package's file. "peft" is a folder with LoRA of r=1, lora_A of ones, which PEFT,
            transformers, diffusers and servers of LoRA read; "peft-miss" one with MiSS of r=1, which PEFT reads.

    Raises:
        ConfigError: the path is that of a file of another kind: an ONNX model, the weights of a model; an unknown
            format; PEFT has no place for a part of the adapter, which is named.
        StateError: the model is not adapted, or a `disabled` block is open.
        AdapterFileError: a vector holds NaN or infinity (training diverged).
        OSError: the file can't be written; an old file is left as it was.
    """
    one_of("format", format, [ONELORA, *PEFT_FORMATS])
    if format == ONELORA:
        refuse_other_kinds(path, ADAPTER, "path")
    else:
        refuse_other_folders(path)
    root = unwrap(model)
    file = _content(root, state_of(root, "save"))
    if format != ONELORA:
        file = dataclasses.replace(file, saved=whole_modules(root, file))
    check_finite(file.tensors, "nothing was written: the training has diverged")
    with together(list(root.parameters()), Path(path)) as mine:
        if mine and format != ONELORA:
            write_folder(file, path, format, {name for name, _ in named_modules(root)})
        elif mine:
            with replacing(path) as beside:
                write_adapter(file, beside)


def _content(root: nn.Module, state: AdapterState) -> AdapterFile:
    """What a file of the model holds."""
    targets = adapted_weights(root)
    return AdapterFile(
        config=state.config,
        vectors={name: whole(vector.detach()).to("cpu", torch.float32) for name, vector in vectors(root).items()},
        saved={n: whole(tensor.detach()).to("cpu", copy=True) for n, tensor in saved_tensors(root, state).items()},
        fingerprints={
            name: fingerprint_of(target) for name, target in over_weights("fingerprint of the base", targets)
        },
        producer="",
        bases=bases_of(state.originals),
        aliases=tied_names(root, state),
        uses=state.uses,
        layers=layers_of(root, targets),
        base_model=base_model_of(root),
        task_type=task_type_of(root),
    )


def bases_of(originals: Mapping[str, Tensor]) -> dict[str, Fingerprint]:
    """Fingerprints of what heads and norms were before training; counters have none."""
    return {name: fingerprint_of_values(value) for name, value in originals.items() if value.is_floating_point()}


def write_adapter(file: AdapterFile, path: PathLike) -> None:
    """Write what an adapter file holds, to a path that nothing reads yet (`replacing`)."""
    metadata = {
        "format": FORMAT,
        "format_version": "2" if file.unknown else "1",
        "config": file.config.to_json(),
        **base_to_metadata(file),
    }
    save_file({name: tensor.contiguous() for name, tensor in file.tensors.items()}, path, metadata)


def load_adapter(model: Model, path: PathLike, approximate: bool = False) -> Model:
    """Load an adapter file, or a folder of PEFT, into a model; a compiled model is not compiled again.

    Of a model that is sharded over processes every process must call this, and can read the file. A model that is
    not adapted yet is adapted as the file says. Everything is checked before the first value is
    written: after an error the model is as it was. A folder that PEFT wrote does not know its base: that this can't be
    checked is a `OneLoRAWarning`; names and shapes are checked.

    Args:
        model: the model, plain or compiled, adapted or not.
        path: a file of `save_adapter`, or a folder of PEFT: LoRA whose lora_A is constant, MiSS or Bone of r=1.
        approximate: take the best vector of each layer of a LoRA that is more than that, b = ΔW 1 / in_features; a
            `OneLoRAWarning` says which share of ‖ΔW‖² that keeps.

    Returns:
        The same object.

    Raises:
        AdapterFileError: a damaged file, a newer format, other modules or shapes than the model's, NaN or infinity, an
            adapter of PEFT that vectors can't hold.
        BaseMismatchError: the adapter was trained on another base.
        StateError: a `disabled` block is open.
    """
    root = unwrap(model)
    file = read_adapter(path, approximate)
    fresh, new = not adapted_weights(root), not was_adapted(root)
    if fresh:
        refuse_sharded(root, "adapt", "load the adapter before fully_shard")
    state = attach_like(root, file, path) if fresh else state_of(root, "load")
    try:
        check_model(root, state, file, path)
    except Exception:
        if new:
            undo_adapt(root)  # a compiled call adapts it still
        elif fresh:
            release(root, state)
        raise
    current: dict[str, Tensor] = {**vectors(root), **saved_tensors(root, state)}
    values = {name: state.originals[name] for name in left_to_the_base(state, file)} | file.tensors
    with torch.inference_mode(False), torch.no_grad():
        for name, value in values.items():
            write_whole(current[name], value)
    if file.projection is not None:
        warnings.warn(f"{path} was approximated: vectors keep {file.projection.text}", OneLoRAWarning, stacklevel=2)
    if file.unknown:
        warnings.warn(unchecked(root, file, path), OneLoRAWarning, stacklevel=2)
    return model


def read_adapter(path: PathLike, approximate: bool = False) -> AdapterFile:
    """Read and check an adapter file, or a folder of PEFT, by itself, without a model.

    Args:
        path: a file of `save_adapter`, or a folder of PEFT.
        approximate: as in `load_adapter`; the result's `projection` says what is kept.

    Raises:
        AdapterFileError: not an adapter file, damaged, of a newer format version, or with NaN or infinity; an adapter
            of PEFT that vectors can't hold.
        FileNotFoundError: there is no such file.
    """
    path = as_path(path, "path")
    if path.is_dir():
        return read_folder(path, approximate)
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
        base = parsed_base(metadata)
    except DAMAGED as error:  # a ConfigError is a ValueError
        raise AdapterFileError(f"{path}: damaged metadata: {error}") from error
    if missing := sorted(set(base.names) - set(tensors)):
        raise AdapterFileError(f"{path}: the file names vectors that it does not hold: {shortened(missing)}")
    found = {name: tensors[name] for name in tensors if name in base.names}
    check_vectors(found, base.fingerprints, path)
    if not found:
        raise AdapterFileError(f"{path} holds no vector")
    check_finite(tensors, f"{path} was not loaded")
    saved = {name: tensor for name, tensor in tensors.items() if name not in found}
    if strange := sorted(set(base.bases) - set(saved)):
        raise AdapterFileError(f"{path}: the file names trained tensors that it does not hold: {shortened(strange)}")
    known = {field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.name != "names"}
    return AdapterFile(config=config, vectors=found, saved=saved, **known)


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
