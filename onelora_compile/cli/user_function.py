"""What the user's `module:function` gives to a command, and whose mistake it is when that fails."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from onelora_compile.cli.mistakes import described
from onelora_compile.errors import ConfigError, ExportError, OneLoRAError
from onelora_compile.kinds import as_args

FORM = "(model, args) or (model, args, kwargs)"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and the inputs to call it with.

    Attributes:
        name: how the user called the function.
        model: what it returned, and so are `args` and `kwargs`.
        files: the user's code.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    files: tuple[str, ...] = ()

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Say so where what failed inside is the model on its own inputs: found by calling it, only after a failure.

        Raises:
            ConfigError: the model, called in eager, raises as well.
        """
        from onelora_compile.exporters.calls.evaluating import evaluating

        try:
            with _silent_torch():
                yield
        except Exception as error:
            if isinstance(error, OSError) or (isinstance(error, OneLoRAError) and not isinstance(error, ExportError)):
                raise
            try:
                with evaluating(self.model):
                    self.model(*self.args, **self.kwargs)
            except Exception as own:
                called = f"{self.name!r}: {type(self.model).__name__}, called with the inputs that it returned,"
                raise ConfigError(f"{called} raised {described(own)}") from own
            raise


def load_target(target: str) -> Loaded:
    """Import a module, from the current folder too, and call its function.

    Args:
        target: `module:function`.

    Raises:
        ConfigError: whatever goes wrong in that; the message says where in the user's code.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{target!r} is not of the form module:function, for example mymodels:make_vit")
    module = _imported(target, module_name)
    function = getattr(module, name, None)
    if function is None:
        raise ConfigError(f"{target!r}: the module {module_name!r} has no {name!r}")
    loaded = _checked(target, _called(target, function))
    return dataclasses.replace(loaded, files=(module.__file__,) if module.__file__ else ())


@contextlib.contextmanager
def _silent_torch() -> Iterator[None]:
    """Without the tracebacks that PyTorch logs of what it also raises; TORCH_LOGS brings them back."""
    logger = logging.getLogger("torch")
    level = logger.level
    if "TORCH_LOGS" not in os.environ:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _imported(target: str, name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    if name.startswith(".") or "/" in name or name.endswith(".py"):
        raise ConfigError(
            f"{target!r}: name the module as an import does, mymodels:make_vit, in the folder that holds it"
        )
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            where = "run the command in the folder that holds the module"
            raise ConfigError(f"{target!r}: {error}; {where}") from error
        raise ConfigError(f"{target!r}: importing {name!r} raised {described(error)}") from error


def _called(target: str, function: Callable[..., Any]) -> Any:
    if not callable(function):
        raise ConfigError(f"{target!r} is no function but {_kind(function)}; it must return {FORM}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ConfigError(f"{target!r} is called without arguments: {error}") from error
    except ValueError:  # some built-in functions have no signature
        pass
    try:
        made = function()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{target!r} raised {described(error)}") from error
    if inspect.iscoroutine(made):
        made.close()  # else Python says on standard error that nobody awaited it
        raise ConfigError(f"{target!r} is an async function, which nothing awaits here; it must return {FORM}")
    return made


def _checked(target: str, made: Any) -> Loaded:
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        length = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
        raise ConfigError(f"{target!r} must return {FORM}, not {_kind(made)}{length}")
    model, args, kwargs = (*made, {}) if len(made) == 2 else made
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{target!r} must return {FORM}; its model is {_kind(model)}, no torch.nn.Module")
    if isinstance(args, Mapping):
        raise ConfigError(f"{target!r} must return {FORM}; its args are a mapping: return (model, (), kwargs)")
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise ConfigError(f"{target!r} must return {FORM}; its kwargs are {_kind(kwargs)}, not inputs by name")
    args = as_args(args)
    if not any(isinstance(value, Tensor) for value in pytree.tree_leaves((args, dict(kwargs)))):
        raise ConfigError(f"{target!r} must return {FORM}; there is no tensor among the inputs")
    return Loaded(target, model, args, dict(kwargs))


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
