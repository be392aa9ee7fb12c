"""Adapters as folders of PEFT, `adapter_config.json` and `adapter_model.safetensors`, in both directions.

    "peft"        LoRA of r = 1, lora_A of ones: what PEFT, transformers, diffusers and servers of LoRA read
    "peft-miss"   MiSS of r = 1: half the size; PEFT reads it

What PEFT has no word for (fingerprints, what was not trained of a module that is whole) is metadata of the safetensors
file, which PEFT leaves alone. A folder that PEFT wrote has none: its base can't be checked.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.errors import AdapterFileError, ConfigError
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_content import AdapterFile, check_finite, check_vectors
from onelora_compile.weights.adapter_metadata import base_from_metadata, base_to_metadata
from onelora_compile.weights.atomic_write import replacing, replacing_folder
from onelora_compile.weights.file_kinds import no_safetensors, refuse_other_kinds
from onelora_compile.weights.layers import STATISTICS, trained_modules, without_still_statistics
from onelora_compile.weights.peft_config import CONFIG, LORA, MISS, PeftConfig, config_of, read_config, these_alone
from onelora_compile.weights.peft_tensors import from_peft, to_peft

PEFT, PEFT_MISS = "peft", "peft-miss"
PEFT_FORMATS = {PEFT: LORA, PEFT_MISS: MISS}
TENSORS = "adapter_model.safetensors"
_OURS = {CONFIG, TENSORS}


def refuse_other_folders(out: str | os.PathLike[str], what: str = "path") -> None:
    """Check that a folder of PEFT takes the place of nothing else.

    Raises:
        ConfigError: the name is that of a file, or a file is there, or a folder with anything else in it.
    """
    refuse_other_kinds(out, "", what)
    if not os.path.lexists(out):
        return
    if not os.path.isdir(out):
        raise ConfigError(f"{what}={str(out)!r} is a file, and a folder is written: give another name")
    if (held := set(os.listdir(out))) and held != _OURS:
        found = shortened(sorted(held - _OURS)) if held - _OURS else f"no {shortened(sorted(_OURS - held))}"
        raise ConfigError(
            f"{what}={str(out)!r} is there and holds {found}: only an empty folder, or one of an adapter of PEFT and "
            "nothing else, is replaced. Give another name"
        )


def write_folder(
    file: AdapterFile,
    out: str | os.PathLike[str],
    peft_format: str = PEFT,
    modules: Collection[str] = (),
    carried: Collection[str] = (),
) -> None:
    """Write an adapter as a folder of PEFT, in one step.

    Args:
        file: the adapter.
        out: the folder; an adapter of PEFT that is there is replaced, if nothing else is with it.
        peft_format: "peft" or "peft-miss".
        modules: names of all modules of the model, where they are known.
        carried: what of `file.saved` was not trained, and is there because PEFT holds whole modules.

    Raises:
        ConfigError: what PEFT has no place for, or something else is there.
        OSError: it can't be written; nothing is left then.
    """
    refuse_other_folders(out)
    peft_type = PEFT_FORMATS[peft_format]
    saved = without_still_statistics(file)
    bases = {name: known for name, known in file.bases.items() if name in saved}
    file = dataclasses.replace(file, saved=saved, bases=bases)
    roots = trained_modules(file)
    partly = [one for one in roots if f"{one}.running_mean" in file.saved and f"{one}.weight" not in file.saved]
    if partly and not modules:
        raise ConfigError(
            f"the running statistics of {shortened(partly)} moved in training, and PEFT holds whole modules alone: "
            "load the adapter into the model and save that, onelora.save_adapter(model, folder, format='peft')"
        )
    tensors = {name: tensor.contiguous() for name, tensor in to_peft(file, peft_type).items()}
    known = modules or [*file.vectors, *roots]
    text = json.dumps(config_of(file, peft_type, roots, known), indent=2, sort_keys=True)
    with replacing_folder(out) as folder:
        with replacing(folder / TENSORS) as beside:
            said = {"carried": json.dumps(sorted(carried))} if carried else {}
            save_file(tensors, beside, {"format": "pt"} | base_to_metadata(file) | said)
        with replacing(folder / CONFIG) as beside:
            beside.write_text(f"{text}\n", encoding="utf-8")


def read_folder(folder: Path, approximate: bool = False) -> AdapterFile:
    """Read and check an adapter of PEFT by itself, without a model.

    Args:
        folder: that PEFT or this package wrote.
        approximate: take the best vector for each layer of a LoRA that is more than that.

    Raises:
        AdapterFileError: no adapter of PEFT, damaged, of another kind, or more than vectors hold.
    """
    _check_files(folder)
    config = read_config(folder)
    path = folder / TENSORS
    try:
        with safetensors.safe_open(path, framework="pt") as held:
            metadata = held.metadata() or {}
            stored: dict[str, Tensor] = {name: held.get_tensor(name) for name in held.keys()}
    except safetensors.SafetensorError as error:
        raise AdapterFileError(no_safetensors(path, error)) from error
    return adapter_of(config, stored, metadata, path, approximate)


def adapter_of(
    config: PeftConfig, stored: dict[str, Tensor], metadata: dict[str, str], path: Path, approximate: bool
) -> AdapterFile:
    """An adapter from what is stored of one of PEFT.

    Args:
        config: its configuration.
        stored: its tensors, by PEFT's keys.
        metadata: of their file.
        path: of their file, for messages.
        approximate: as in `read_folder`.

    Raises:
        AdapterFileError: tensors that are damaged or missing, or more than vectors hold.
    """
    check_finite(stored, f"{path} was not loaded")
    found = from_peft(config, stored, path, approximate)
    check_finite(found.vectors, f"{path}: a vector is too large for float32")
    known = base_from_metadata(metadata, found.vectors, found.saved, path)
    fingerprints = found.fingerprints | known.fingerprints
    check_vectors(found.vectors, fingerprints, path)
    if missing := sorted(set(config.whole_names) - set(found.vectors)):
        raise AdapterFileError(
            f"{path} has no tensors for {shortened(missing)}, which its target_modules select: they would stay the "
            "base's"
        )
    saved, roots = found.saved, found.roots
    if known.names:
        saved = {name: value for name, value in saved.items() if name not in known.carried}
        trained = [name for name in saved if not name.endswith(STATISTICS)]
        roots = [root for root in roots if any(name.startswith(f"{root}.") for name in trained)]
    return AdapterFile(
        config=_selection(config, list(found.vectors), roots),
        vectors=found.vectors,
        saved=saved,
        producer=known.producer or f"PEFT {config.fields.get('peft_version') or ''}".strip(),
        fingerprints=fingerprints,
        bases=known.bases,
        uses=known.uses,
        layers=known.layers or found.layers,
        base_model=config.base_model,
        task_type=str(config.fields.get("task_type") or ""),
        projection=found.projection,
        parts=known.parts,
    )


def _selection(config: PeftConfig, names: list[str], roots: list[str]) -> OneLoRAConfig:
    """What was selected: PEFT's lists where those say it, else the modules that there are tensors for."""
    targets: Any = config.fields.get("target_modules")
    excluded: Any = config.fields.get("exclude_modules") or None
    listed = isinstance(targets, list) and bool(targets)
    if not listed or isinstance(excluded, str) or config.fields.get("layers_to_transform") is not None:
        # Their expression is not tried: a hostile one takes for ever. A list of names would select their endings too.
        return OneLoRAConfig(target_modules=these_alone(names), modules_to_save=roots)
    return OneLoRAConfig(targets, excluded, roots)


def _check_files(folder: Path) -> None:
    """Whether a folder has the files of an adapter, and nothing in their place."""
    held = sorted(os.listdir(folder))
    if CONFIG not in held:
        inside = [name for name in held if (folder / name / CONFIG).is_file()]
        hint = f"; {shortened(str(folder / one) for one in inside)} is one" if inside else ""
        raise AdapterFileError(f"{folder} is no adapter of PEFT: it has no {CONFIG}{hint}")
    if TENSORS in held:
        return
    if parts := [name for name in held if name.startswith("adapter_model") and ".safetensors" in name]:
        raise AdapterFileError(
            f"{folder} is split over several files ({shortened(parts, 3)}), which PEFT does not read either: load them "
            "in the program that wrote them, and save the adapter in one"
        )
    if pickles := [name for name in held if name.endswith((".bin", ".pt", ".pth", ".pkl"))]:
        raise AdapterFileError(
            f"{folder} holds its tensors as a pickle ({shortened(pickles)}), which could run any code and is not "
            "opened: load it with PEFT where you trust it, and save_pretrained writes safetensors"
        )
    raise AdapterFileError(f"{folder} has no {TENSORS}; it holds {shortened(held)}")
