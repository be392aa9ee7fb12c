"""Adapters in the formats of runtimes, and back.

.safetensors     this project's adapter file (onelora_compile/weights/adapter_file.py)
.onnx_adapter    ONNX Runtime's adapter, for models of mode "input": `LoraAdapter.Load`, `RunOptions.add_active_adapter`
.vectors         raw float32 in the order of one model of mode "load": put in the place of its `<model>.vectors`
.gguf            llama.cpp's (onelora_compile/weights/gguf_file.py, gguf_read.py)
a folder         PEFT's (onelora_compile/weights/peft_folder.py)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.errors import AdapterFileError, ConfigError, one_of, require
from onelora_compile.exporters.onnx_file.load import load_model
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.file_names import as_file, as_path
from onelora_compile.weights.adapter_content import float32
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter, write_adapter
from onelora_compile.weights.atomic_write import refuse_overwriting, replacing
from onelora_compile.weights.file_kinds import GGUF_FILE, refuse_other_kinds
from onelora_compile.weights.gguf_base import layout_for
from onelora_compile.weights.gguf_file import write_gguf
from onelora_compile.weights.hub_download import fetched
from onelora_compile.weights.peft_folder import PEFT, PEFT_FORMATS, refuse_other_folders, write_folder

PathLike = str | os.PathLike[str]
_WHOLE = (".safetensors", GGUF_FILE)  # files that say what their numbers are
_ENDINGS = (".safetensors", ".onnx_adapter", ".vectors", GGUF_FILE)


def convert_adapter(
    source: PathLike,
    out: PathLike,
    like: PathLike | None = None,
    format: str | None = None,
    approximate: bool = False,
    base: PathLike | None = None,
) -> Path:
    """Write an adapter in the format that the ending of `out` names, or as a folder of PEFT.

    Args:
        source: an adapter in one of the formats, or an id on the Hugging Face Hub, as `load_adapter` takes.
        out: the file or folder to write, replaced in one step. The `.vectors` file of a model of mode "load" may be it:
            the model begins with this adapter then.
        like: an ONNX model of the adapter's base, of mode "load" or "input", written by this package: gives the order
            of ".vectors", and what the formats of runtimes do not hold (configuration, fingerprints) to ".safetensors".
            With it, an adapter that does not belong to the model is refused.
        format: "peft" or "peft-miss" writes a folder of PEFT, as `save_adapter` does. None goes by the ending of
            `out`; without an ending it is "peft".
        approximate: of a folder or a ".gguf" with a LoRA that is more than vectors: take the best vector of each layer.
        base: the base, to or from ".gguf": its folder, or the `config.json` in it, which tell its architecture; or its
            own `.gguf`, whose weights are compared with the adapter's fingerprints where one is written. None takes
            the folder that the adapter names as its base, and is enough to read what is not of the Llama family.

    Returns:
        `out`.

    Raises:
        ConfigError: `out` is one of the inputs; an unknown ending; `like` or `base` is missing where it is needed;
            PEFT or llama.cpp has no place for a part of the adapter; an architecture whose form in llama.cpp is not
            known.
        AdapterFileError: a damaged source, or one with other vectors than the model.
        BaseMismatchError: the adapter was trained on another base than the model, or the `.gguf` of the base.
        MissingExtraError: a package that the format needs is not installed.
    """
    source, given, out = fetched(as_path(source, "source")), out, as_path(out, "out")
    one_of("format", format, [None, *PEFT_FORMATS])
    if format is None and not out.suffix:
        format = PEFT
    if format is None:
        as_file(given, "out")
    if not source.suffix and not source.exists():
        raise FileNotFoundError(f"there is no file or folder {source}")
    for path, folder in ((source, source.is_dir()), (out, format is not None)):
        if path.suffix not in _ENDINGS and not folder:
            raise ConfigError(
                f"{path}: the ending names the format, one of {', '.join(_ENDINGS)}; an adapter of PEFT is a folder "
                "(format='peft', --to peft)"
            )
    if base is not None and source.suffix != GGUF_FILE and (out.suffix != GGUF_FILE or format is not None):
        raise ConfigError(f"base={str(base)!r} is for a {GGUF_FILE}, and neither {source} nor {out} is one")
    refuse_overwriting(out, [source, *(one for one in (like, base) if one is not None)])
    if format is None:
        refuse_other_kinds(out, out.suffix)
    else:
        refuse_other_folders(out, "out")
    model = None if like is None else _metadata(as_path(like, "like"))
    whole = source.is_dir() or source.suffix in _WHOLE
    needs = ".vectors" in (source.suffix, out.suffix) or (not whole and out.suffix == ".safetensors")
    if needs and model is None:
        raise ConfigError(f"{source} to {out}: give the ONNX model that it belongs to (like=, --like)")
    file, values = _read(source, model, approximate, base if source.suffix == GGUF_FILE else None)
    if file is not None and model is not None:
        model.check_fits(file, str(like))
    if format is not None:
        write_folder(file or _adapter_like(model, values), out, format)
        return out
    with replacing(out) as beside:
        if out.suffix == ".onnx_adapter":
            _write_ort(values, beside)
        elif out.suffix == ".vectors":
            assert model is not None
            beside.write_bytes(b"".join(values[name].astype("<f4").tobytes() for name in model.vectors))
        elif out.suffix == GGUF_FILE:
            held = file or _adapter_like(model, values)
            write_gguf(held, beside, layout_for(held, None if base is None else as_path(base, "base")))
        else:
            write_adapter(file or _adapter_like(model, values), beside)
    return out


def _adapter_like(model: Metadata | None, values: Mapping[str, np.ndarray]) -> AdapterFile:
    if model is None:
        raise ConfigError(
            "an .onnx_adapter holds numbers alone: give the ONNX model that it belongs to (like=, --like)"
        )
    return adapter_of(model, values, model.producer)


def adapter_of(
    model: Metadata, values: Mapping[str, np.ndarray], producer: str, config: OneLoRAConfig | None = None
) -> AdapterFile:
    """An adapter file of what a model takes.

    Args:
        model: what the model says.
        values: float32 of all that it takes, by name.
        producer: what made it.
        config: None selects what there are values for: the formats of runtimes hold no configuration.
    """
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in values.items()}
    saved = {name: tensor for name, tensor in tensors.items() if name in model.trained}
    vectors = {name: tensor for name, tensor in tensors.items() if name not in saved}
    if config is None:
        # Running statistics travel without being asked for: a batch norm of which nothing else is there is not trained.
        chosen = [name for name in saved if not name.endswith(("running_mean", "running_var"))]
        owners = {name.rpartition(".")[0] or name for name in chosen}
        config = OneLoRAConfig(target_modules=list(vectors), modules_to_save=sorted(owners))
    prints, bases = dict(model.fingerprints), dict(model.trained)
    return AdapterFile(config, vectors, saved, prints, producer, bases, uses=dict(model.uses))


def _read(
    source: Path, model: Metadata | None, approximate: bool, base: PathLike | None
) -> tuple[AdapterFile | None, dict[str, np.ndarray]]:
    if source.suffix in _WHOLE or source.is_dir():
        file = read_adapter(source, approximate, base=base)
        taken = (
            file.tensors
            if model is None
            else {name: file.tensors[name] for name in model.vectors if name in file.tensors}
        )
        return file, {name: float32(value) for name, value in taken.items()}
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    if source.suffix == ".onnx_adapter":
        values = _read_ort(source)
    else:
        assert model is not None
        values = _read_raw(source, model)
    if model is not None:
        known = {name: tuple(shape) for name, shape in model.vectors.items()}
        if {name: value.shape for name, value in values.items()} != known:
            raise AdapterFileError(f"{source} has other vectors than the model, or of other shapes")
    if bad := [name for name, value in values.items() if not np.isfinite(value).all()]:
        raise AdapterFileError(f"{source}: NaN or infinity in {', '.join(bad)}")
    return None, values


def _read_raw(source: Path, model: Metadata) -> dict[str, np.ndarray]:
    sizes = {name: int(np.prod(shape)) for name, shape in model.vectors.items()}
    content = source.read_bytes()
    if len(content) != 4 * sum(sizes.values()):
        raise AdapterFileError(
            f"{source} has {len(content)} bytes; the model's vectors are {sum(sizes.values())} numbers of 4"
        )
    numbers = np.frombuffer(content, "<f4")
    ends = np.cumsum(list(sizes.values()))
    parts = np.split(numbers, ends[:-1])
    return {name: part.reshape(model.vectors[name]) for name, part in zip(sizes, parts, strict=True)}


def _read_ort(source: Path) -> dict[str, np.ndarray]:
    runtime = require("onnxruntime", "onnx", "read an .onnx_adapter")
    try:
        held: Mapping[str, Any] = runtime.AdapterFormat.read_adapter(str(source)).get_parameters()
        return {name: np.array(value.numpy()) for name, value in held.items()}
    except Exception as error:  # onnxruntime raises classes of its own that share no base but Exception
        raise AdapterFileError(f"{source} is not an adapter of ONNX Runtime, or is damaged: {error}") from error


def _write_ort(values: Mapping[str, np.ndarray], path: Path) -> None:
    runtime = require("onnxruntime", "onnx", "write an .onnx_adapter")
    adapter = runtime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: runtime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:  # its word for a full disk
        raise OSError(
            errno.EIO, "ONNX Runtime failed; the disk is full, or a file may not be so large", str(path)
        ) from error


def _metadata(path: Path) -> Metadata:
    found = Metadata.from_props(load_model(path).metadata_props, str(path))
    if not found.vectors:
        raise ConfigError(f"{path} says nothing of vectors: it was not written by this package from an adapted model")
    if not found.traits.takes_files:
        raise ConfigError(
            f"{path} takes no adapter file (mode {found.mode!r}): give a model that was exported with "
            "adapters='load' or 'input'"
        )
    return found
