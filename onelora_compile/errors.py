"""One class per kind of user mistake. Each also is the built-in exception that a caller would expect."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType


class OneLoRAError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(OneLoRAError, ValueError):
    """A `OneLoRAConfig` or a backend option that can't be meant."""


class TargetError(OneLoRAError, ValueError):
    """The selection rules select nothing, or something that can't be adapted."""


class StateError(OneLoRAError, RuntimeError):
    """The call does not fit the state of the model: adapted twice, not adapted, disabled."""


class AdapterFileError(OneLoRAError, ValueError):
    """An adapter file that is damaged, hostile, of a newer format, or of other sites."""


class BaseMismatchError(AdapterFileError):
    """The adapter was trained on another base than the model at hand."""


class MergeError(OneLoRAError, RuntimeError):
    """A weight into which a vector can't be merged or folded."""


class PassError(OneLoRAError, RuntimeError):
    """A graph pass failed, or left a graph that breaks an invariant."""


class ExportError(OneLoRAError, RuntimeError):
    """An export that failed, or whose result is not the model."""


class HubError(OneLoRAError, OSError):
    """The Hugging Face Hub did not take what was pushed to it."""


class MissingExtraError(OneLoRAError, ImportError):
    """An optional dependency is not installed."""


class OneLoRAWarning(UserWarning):
    """What the user should know and can filter as one category."""


def one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Check the value of an option.

    Raises:
        ConfigError: it is none of the choices.
    """
    known = list(choices)
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")


def require(module: str, extra: str | None, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: name to import, for example `"onnxruntime"`.
        extra: the extra of this package that installs it, for example `"onnx"`; None where it is a package of its own.
        purpose: what it is needed for, as the end of "… is needed to".

    Raises:
        MissingExtraError: it is not installed; the message names what installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # A package that is there but misses one of its own dependencies fails the same way: show which.
        missing = f" ({error})" if getattr(error, "name", None) not in (None, module) else ""
        package = f"'onelora-compile[{extra}]'" if extra else module.partition(".")[0]
        raise MissingExtraError(
            f"{module!r} is needed to {purpose} and can't be imported{missing}. Install it with: pip install {package}"
        ) from error
