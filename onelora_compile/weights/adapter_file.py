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
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from onelora_compile.adapting.adapter import unwrap
from onelora_compile.adapting.adapter_state import AdapterState, adapted_weights, state_of
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.module_names import named_modules
from onelora_compile.adapting.trained_besides import saved_tensors
from onelora_compile.errors import AdapterFileError, ConfigError, one_of
from onelora_compile.file_names import as_path
from onelora_compile.many_adapters.values import values_of
from onelora_compile.printable import shortened
from onelora_compile.progress import over_weights
from onelora_compile.sharded import together, whole
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_content import AdapterFile as AdapterFile
from onelora_compile.weights.adapter_content import check_finite, check_vectors
from onelora_compile.weights.adapter_metadata import DAMAGED, base_to_metadata, parsed_base
from onelora_compile.weights.atomic_write import replacing
from onelora_compile.weights.diffusers_file import is_lora, read_lora
from onelora_compile.weights.file_kinds import ADAPTER, FORMAT, GGUF_FILE, no_safetensors, refuse_other_kinds
from onelora_compile.weights.fingerprint import Fingerprint, fingerprint_of, fingerprint_of_values
from onelora_compile.weights.fits_model import on_the_base, tied_names
from onelora_compile.weights.gguf_base import layout_of_base
from onelora_compile.weights.gguf_file import GGUF, write_gguf
from onelora_compile.weights.gguf_layout import layout_of_model
from onelora_compile.weights.gguf_read import read_gguf
from onelora_compile.weights.hub_download import Token, local_adapter
from onelora_compile.weights.layers import base_model_of, layers_of, task_type_of, whole_modules
from onelora_compile.weights.peft_config import CONFIG
from onelora_compile.weights.peft_folder import PEFT_FORMATS, read_folder, refuse_other_folders, write_folder

FORMAT_VERSION = 2
PathLike = str | os.PathLike[str]
ONELORA = "onelora"
_ENDINGS = {ONELORA: ADAPTER, GGUF: GGUF_FILE}  # the formats of save_adapter that are files


def save_adapter(model: nn.Module, path: PathLike, format: str = ONELORA, *, adapter_name: str | None = None) -> None:
    """Write an adapter of the model to one safetensors file, as a folder of PEFT or for llama.cpp, in one step.

    Of a model that is sharded over processes (`fully_shard`) every process must call this; one writes the file.

    Args:
        model: the adapted model.
        path: the file, or the folder for PEFT.
        format: "onelora" is this package's file. "peft" is a folder with LoRA of r=1, lora_A of ones, which PEFT,
            transformers, diffusers and servers of LoRA read; "peft-miss" one with MiSS of r=1, which PEFT reads.
            "gguf" is a file of LoRA that llama.cpp reads, of a language model of transformers; it needs the package
            gguf.
        adapter_name: which one; None is the active one. Of several each is on its own linears alone, and on those
            where its vector is not zero.

    Raises:
        ConfigError: the path is that of a file of another kind: an ONNX model, the weights of a model; an unknown
            format; PEFT or llama.cpp has no place for a part of the adapter, which is named, or llama.cpp's form of
            the model is not known.
        MissingExtraError: the package gguf is not installed.
        StateError: the model is not adapted, or has no such adapter; a `disabled` block is open.
        AdapterFileError: a vector holds NaN or infinity (training diverged).
        OSError: the file can't be written; an old file is left as it was.
    """
    one_of("format", format, [ONELORA, *PEFT_FORMATS, GGUF])
    if format in PEFT_FORMATS:
        refuse_other_folders(path)
    else:
        refuse_other_kinds(path, _ENDINGS[format], "path")
    root = unwrap(model)
    state = state_of(root, "save")
    file = content_of(root, state, adapter_name, base_fingerprints(root, state))
    trained = set(file.saved)
    if format in PEFT_FORMATS:
        file = dataclasses.replace(file, saved=whole_modules(root, file))
    check_finite(file.tensors, "nothing was written: the training has diverged")
    with together(list(root.parameters()), Path(path)) as mine:
        if mine and format in PEFT_FORMATS:
            write_folder(file, path, format, {name for name, _ in named_modules(root)}, set(file.saved) - trained)
        elif mine:
            with replacing(path) as beside:
                if format == GGUF:
                    write_gguf(file, beside, layout_of_model(root))
                else:
                    write_adapter(file, beside)


def content_of(
    root: nn.Module, state: AdapterState, name: str | None, fingerprints: Mapping[str, Fingerprint]
) -> AdapterFile:
    """What a file of an adapter of the model holds; of the active one for None."""
    values = values_of(root, state, name)
    targets = {key: target for key, target in adapted_weights(root).items() if key in values.vectors}
    tensors = {key: tensor for key, tensor in saved_tensors(root, state).items() if key in values.saved}
    return AdapterFile(
        config=values.config,
        vectors={key: whole(vector).to("cpu", torch.float32, copy=True) for key, vector in values.vectors.items()},
        saved={key: whole(tensor).to("cpu", copy=True) for key, tensor in values.saved.items()},
        fingerprints={key: fingerprints[key] for key in targets},
        producer="",
        bases=bases_of({key: state.originals[key] for key in values.saved}),
        aliases=tied_names(root, tensors),
        uses={key: uses for key, uses in state.uses.items() if key in targets or key in values.saved},
        layers=layers_of(root, targets),
        base_model=base_model_of(root),
        task_type=task_type_of(root),
    )


def base_fingerprints(root: nn.Module, state: AdapterState) -> dict[str, Fingerprint]:
    """The fingerprints of the base's weights, by the names of their vectors."""
    targets = on_the_base(adapted_weights(root), state.originals)
    return {key: fingerprint_of(target) for key, target in over_weights("fingerprint of the base", targets)}


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


def read_adapter(
    path: PathLike,
    approximate: bool = False,
    *,
    base: PathLike | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
) -> AdapterFile:
    """Read and check an adapter file, or a folder of PEFT, by itself, without a model.

    Args:
        path: a file of `save_adapter`, a folder of PEFT, a LoRA of diffusers, or an id on the Hugging Face Hub, as in
            `load_adapter`.
        approximate: as in `load_adapter`; the result's `projection` says what is kept.
        base: of a `.gguf`, its base: the folder, the `config.json` in it, or its own `.gguf`. It tells the order of the
            rows, which that of a Llama needs.
        revision: as in `load_adapter`.
        subfolder: as in `load_adapter`.
        token: as in `load_adapter`.

    Raises:
        AdapterFileError: not an adapter file, damaged, of a newer format version, or with NaN or infinity; an adapter
            of PEFT or llama.cpp that vectors can't hold; a repository without an adapter.
        FileNotFoundError: there is no such file, and the Hub does not give it.
        ConfigError: a revision of what is here; a subfolder that leads out of its folder; the base of a `.gguf` is
            missing where it is needed, or given for another file.
        MissingExtraError: the package gguf is not installed, for a `.gguf`.
    """
    path = local_adapter(path, revision, subfolder, token)
    if path.suffix == GGUF_FILE:
        return read_gguf(path, None if base is None else layout_of_base(as_path(base, "base")), approximate)
    if base is not None:
        raise ConfigError(f"base={str(base)!r} is for a {GGUF_FILE}, and {path} is none")
    if path.is_dir():
        return read_folder(path, approximate)
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file {path}")
    if path.name == CONFIG:
        raise AdapterFileError(f"{path} is the configuration of an adapter of PEFT: give its folder, {path.parent}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if not (of_diffusers := metadata.get("format") != FORMAT and is_lora(file.keys())):
                _check_format(metadata, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        ours = path.suffix in (".onnx_adapter", ".vectors")
        hint = f"; convert reads it: onelora convert {path} -o a.safetensors --like MODEL.onnx" if ours else ""
        raise AdapterFileError(f"{no_safetensors(path, error)}{hint}") from error
    if of_diffusers:
        return read_lora(tensors, metadata, path, approximate)
    try:
        config = OneLoRAConfig.from_json(metadata["config"])
        said = parsed_base(metadata)
    except DAMAGED as error:  # a ConfigError is a ValueError
        raise AdapterFileError(f"{path}: damaged metadata: {error}") from error
    if missing := sorted(set(said.names) - set(tensors)):
        raise AdapterFileError(f"{path}: the file names vectors that it does not hold: {shortened(missing)}")
    found = {name: tensors[name] for name in tensors if name in said.names}
    check_vectors(found, said.fingerprints, path)
    if not found:
        raise AdapterFileError(f"{path} holds no vector")
    check_finite(tensors, f"{path} was not loaded")
    saved = {name: tensor for name, tensor in tensors.items() if name not in found}
    if strange := sorted(set(said.bases) - set(saved)):
        raise AdapterFileError(f"{path}: the file names trained tensors that it does not hold: {shortened(strange)}")
    known = {field.name: getattr(said, field.name) for field in dataclasses.fields(said)}
    del known["names"], known["carried"]
    return AdapterFile(config=config, vectors=found, saved=saved, **known)


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
