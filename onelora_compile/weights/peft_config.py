"""`adapter_config.json` of PEFT: what of it says that an adapter is one vector for each layer, and what says otherwise.

Source: PEFT 0.21, `peft/tuners/lora/config.py`, `peft/tuners/miss/config.py`; Bone as in 0.17.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onelora_compile.errors import AdapterFileError, ConfigError
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_content import CONV1D, AdapterFile

CONFIG = "adapter_config.json"
LORA, MISS, BONE = "LORA", "MISS", "BONE"
TASKS_WITH_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Fields that change nothing of what a trained adapter computes, or that are read below.
_HARMLESS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
    *("inference_mode", "runtime_config", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "bias", "lora_dropout", "miss_dropout", "mini_r", "init_lora_weights", "init_weights"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying"),
}
# Fields that may be there, switched off, and what they are where they are on.
_OTHER_MAPS = {
    "use_dora": "DoRA, whose update depends on the norms of the base weight",
    "lora_bias": "a bias trained with lora_B",
    "trainable_token_indices": "trained rows of an embedding",
    "target_parameters": "LoRA on parameters, as those of experts",
    "layer_replication": "layers that are used several times, each with an update of its own",
    "alora_invocation_tokens": "an activated LoRA, which is on from some token onwards",
    "use_qalora": "QALoRA, which pools the input",
}
# Patterns of modules that are tried: one repetition at most, so that no file makes a match take for ever.
_TRIED = re.compile(r"[\w.\\^$|()-]*(?:(?:\.[*+]|\\d\+)[\w.\\^$|()-]*)?")
# Initialisations after which the base itself is as it was.
_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """A configuration of PEFT, of a kind that vectors can be read from.

    Attributes:
        peft_type: LORA, MISS or BONE.
        fields: all of it.
    """

    peft_type: str
    fields: dict[str, Any]

    @property
    def modules_to_save(self) -> list[str]:
        """Endings of the names of modules that were trained as a whole."""
        return list(self.fields.get("modules_to_save") or ())

    @property
    def whole_names(self) -> list[str]:
        """The names of all adapted modules, where those are said: as this package does. PEFT says endings."""
        targets: Any = self.fields.get("target_modules")
        alone = isinstance(targets, list) and self.fields.get("exclude_modules") == _all_but(targets)
        return targets if alone else []

    @property
    def base_model(self) -> str:
        """The name or path of the base; "" without."""
        return str(self.fields.get("base_model_name_or_path") or "")

    def rank(self, name: str) -> int:
        """The rank that a module should have."""
        return int(_by_pattern(self.fields.get("rank_pattern"), name, self.fields["r"]))

    def scaling(self, name: str, rank: int) -> float:
        """The factor of B A for a module: alpha / r, alpha / sqrt(r) of rsLoRA; 1 of MiSS and Bone."""
        if self.peft_type != LORA:
            return 1.0
        alpha = float(_by_pattern(self.fields.get("alpha_pattern"), name, self.fields["lora_alpha"]))
        return alpha / (rank**0.5 if self.fields.get("use_rslora") else rank)


def _is_tried(expression: str) -> bool:
    try:
        re.compile(expression)
    except re.error:
        return False
    return _TRIED.fullmatch(expression) is not None


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that a name ends with, as a regular expression after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def read_config(folder: Path) -> PeftConfig:
    """Read and check the configuration of a PEFT folder.

    Raises:
        AdapterFileError: damaged, or of an adapter that vectors can't hold; it names what that is.
    """
    path = folder / CONFIG
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not JSON, or is damaged: {error}") from error
    return checked_config(fields, path)


def checked_config(fields: Any, path: Path) -> PeftConfig:
    """Check a configuration.

    Args:
        fields: all of it.
        path: what messages call it.

    Raises:
        AdapterFileError: as `read_config`.
    """
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
        raise AdapterFileError(f"{path} is no configuration of PEFT: it names no peft_type")
    kind = fields["peft_type"]
    if kind not in (LORA, MISS, BONE):
        raise AdapterFileError(
            f"{path}: a {kind} adapter is not one vector for each layer, and would be lost: this package reads LORA, "
            "MISS and BONE"
        )
    if wrong := _malformed(kind, fields):
        raise AdapterFileError(f"{path}: damaged: {wrong}")
    if other := _other_map(kind, fields):
        raise AdapterFileError(f"{path}: {other}. A vector can't hold that, so the adapter is not read")
    return PeftConfig(kind, fields)


def _malformed(kind: str, fields: dict[str, Any]) -> str:
    """What of the fields that are read has the wrong type."""
    numbers: dict[str, Any] = {"r": fields.get("r")} | (
        {"lora_alpha": fields.get("lora_alpha")} if kind == LORA else {}
    )
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        given = fields.get(pattern) or {}
        if not isinstance(given, dict):
            return f"{pattern} is {given!r}"
        for expression, value in given.items():
            if not _is_tried(expression):
                return f"{pattern}: {expression!r} is no regular expression, or has more than one repetition"
            numbers[f"{name} of {expression!r}"] = value
    for name, value in numbers.items():
        rank = not name.startswith("lora_alpha")
        number = isinstance(value, int if rank else int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 1e9 or (rank and value < 1):
            return f"{name} is {value!r}, and has to be {'a whole number from 1' if rank else 'a finite number'}"
    for name in ("modules_to_save", "target_modules", "exclude_modules"):
        value = fields.get(name)
        listed = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
        if value is not None and not listed and not (isinstance(value, str) and name != "modules_to_save"):
            return f"{name} is {value!r}"
    return ""


def _other_map(kind: str, fields: dict[str, Any]) -> str:
    """What the adapter computes besides vectors; "" for nothing."""
    if (bias := fields.get("bias", "none")) != "none":
        return f"bias={bias!r}: biases of the base were trained too"
    for name, what in _OTHER_MAPS.items():
        if fields.get(name):
            return f"{name}: {what}"
    init = fields.get("init_lora_weights", True)
    if kind == LORA and init not in _KEEP_THE_BASE:
        return (
            f"init_lora_weights={init!r}: the base was changed when training began, and the folder is for that one. "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) writes it for the original base"
        )
    if kind != LORA and (init := fields.get("init_weights", True)) not in (True, False):
        return f"init_weights={init!r}: a form of {kind} that is another map"
    strange = [name for name, value in fields.items() if value and name not in _HARMLESS]
    return f"the fields {shortened(strange)} are on, and this package does not know them" if strange else ""


def config_of(file: AdapterFile, peft_type: str, saved: Collection[str], modules: Collection[str]) -> dict[str, Any]:
    """The configuration for a folder that PEFT reads.

    Args:
        file: the adapter.
        peft_type: LORA or MISS.
        saved: modules that were trained as a whole.
        modules: the names of all modules of the model, as far as they are known.

    Raises:
        ConfigError: PEFT's rules can't name these modules alone.
    """
    if taken := sorted(one for one in modules if any(one != own and one.endswith(own) for own in saved)):
        taken = [one for one in taken if not any(one == own or one.startswith(f"{own}.") for own in saved)]
        if taken:
            raise ConfigError(
                f"PEFT takes every module whose name ends like one of modules_to_save ({shortened(saved)}), so also "
                f"{shortened(taken)}: name these in modules_to_save too, or save with format='onelora'"
            )
    heads = TASKS_WITH_HEADS.get(file.task_type)
    # With these tasks PEFT expects the head in the folder.
    task = file.task_type if heads is None or any(one.rpartition(".")[2] in heads for one in saved) else ""
    common: dict[str, Any] = {
        "peft_type": peft_type,
        "task_type": task or None,
        "base_model_name_or_path": file.base_model or None,
        # SGLang takes no expression for target_modules, so that what a list selects besides is excluded.
        "target_modules": list(file.vectors),
        "exclude_modules": _all_but(file.vectors),
        "modules_to_save": sorted(saved) or None,
        "r": 1,
        "bias": "none",
        "inference_mode": True,
    }
    if peft_type == MISS:
        return common | {"miss_dropout": 0.0, "init_weights": True}
    return common | {
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(layer.kind == CONV1D for layer in file.layers.values()),
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def these_alone(names: Collection[str]) -> str:
    """A regular expression for modules of these names and no others."""
    return "|".join(map(re.escape, sorted(names)))


def _all_but(names: Collection[str]) -> str:
    """One for every other module: PEFT takes a list of names as endings, of modules anywhere."""
    return f"(?!(?:{these_alone(names)})$).*"
