"""What to adapt: the configuration that `adapt` takes and that travels in the adapter file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onelora_compile.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OneLoRAConfig:
    """Selection and storage of the vectors; the words and rules are PEFT's.

    Args:
        target_modules: `"all-linear"` (every linear but the output head of a transformers model, and what PEFT has put
            on the model), or one regular expression that must match the whole module name, or a list of names, each
            matching a module of that name or any module whose name ends with `.name`.
        exclude_modules: modules to leave out, by the same rules (no shorthand); None leaves out nothing.
        modules_to_save: modules, by name or ending, whose own parameters are trained as they are and travel in
            the adapter file (a new classification head, for example). They get no vector.
        train_norms: train the parameters of every normalisation layer too ("1LoRA(norms)" in the paper).
        vector_dtype: dtype of the vectors. None means float32, or float64 for a float64 weight.
        target_parameters: weights that a module uses itself, by qualified name or ending, with their input axis:
            `{"text_projection": 0}` for `x @ self.text_projection`. Only for code that `adapt` can't follow by
            itself; what it finds is selected by target_modules.

    Raises:
        ConfigError: a value of the wrong type, or a regular expression that does not compile.

    Source: selection rules of PEFT 0.21, `peft/tuners/tuners_utils.py::check_target_module_exists`.
    """

    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    train_norms: bool = False
    vector_dtype: torch.dtype | None = None
    target_parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen; this is where its fields get their one form
        put(self, "target_modules", _patterns("target_modules", self.target_modules))
        if self.exclude_modules is not None:
            put(self, "exclude_modules", _patterns("exclude_modules", self.exclude_modules))
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save={self.modules_to_save!r} is a string; pass a list: [{self.modules_to_save!r}]"
            )
        put(self, "modules_to_save", _patterns("modules_to_save", self.modules_to_save))
        if not isinstance(self.train_norms, bool):
            raise ConfigError(f"train_norms must be True or False, got {self.train_norms!r}")
        axes = self.target_parameters
        if not isinstance(axes, Mapping) or not all(isinstance(n, str) and type(a) is int for n, a in axes.items()):
            raise ConfigError(f"target_parameters must be a dict of names and input axes, got {axes!r}")
        put(self, "target_parameters", dict(axes))
        dtype = self.vector_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"vector_dtype must be a floating-point torch.dtype or None, got {dtype!r}")

    def to_json(self) -> str:
        """The configuration as JSON; `from_json` reads it back to an equal one."""
        fields = dataclasses.asdict(self)
        fields["vector_dtype"] = str(self.vector_dtype).removeprefix("torch.") if self.vector_dtype else None
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> OneLoRAConfig:
        """Read `to_json` output.

        Raises:
            ConfigError: not such JSON, or a field that this version does not know.
        """
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from error
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or (unknown := sorted(set(fields) - set(known))):
            what = "fields " + ", ".join(map(repr, unknown)) if isinstance(fields, dict) else type(fields).__name__
            raise ConfigError(f"the configuration holds {what}; known are {', '.join(known)}")
        if (dtype := fields.get("vector_dtype")) is not None:
            fields["vector_dtype"] = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        return cls(**fields)


def check_config(given: Any) -> None:
    """Check that what is given as a configuration is one.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(given, OneLoRAConfig):
        return
    fields = dataclasses.fields(OneLoRAConfig)
    if isinstance(given, str) and given.endswith(".safetensors"):
        remedy = "an adapter file goes into onelora.load_adapter(model, path)"
    elif isinstance(given, Mapping):
        remedy = f"pass onelora.OneLoRAConfig(**it), with keys of {', '.join(field.name for field in fields)}"
    elif isinstance(given, (str, list, tuple, set)):
        remedy = f"pass onelora.OneLoRAConfig(target_modules={given!r})"
    else:
        remedy = "pass onelora.OneLoRAConfig(target_modules=...), or None for every linear but the output head"
    raise ConfigError(f"config must be a OneLoRAConfig, got {given!r} (a {type(given).__name__}): {remedy}")


def _patterns(field: str, value: Any) -> str | tuple[str, ...]:
    """A regular expression as it is, a list of names as a tuple."""
    if isinstance(value, str):
        if not value:
            raise ConfigError(f"{field} is an empty string")
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{field}={value!r} is not a regular expression: {error}") from error
        return value
    # A set has no order, and the order is part of what is saved.
    names = sorted(value) if isinstance(value, (set, frozenset)) else value
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{field} must be a string or a list of names, got {value!r}")
    return tuple(names)
