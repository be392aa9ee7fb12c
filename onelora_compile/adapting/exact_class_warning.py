"""The warning where a model goes by the exact class of a module, which an adapted one does not have."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from onelora_compile.errors import OneLoRAWarning
from onelora_compile.weight_uses.exact_classes import exact_classes


def warn_of_exact_classes(root: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Name the code of a model that asks for the exact class of one of the modules, which are to be adapted."""
    for kind, place in exact_classes(root, {type(module) for module in modules}).items():
        warnings.warn(
            f"{type(root).__name__} goes by the exact class {kind.__name__} ({place}), and an adapted module is of a "
            f"subclass of it: there the model is not the base, even with zero vectors. Ask isinstance(module, "
            f"{kind.__name__}) instead, or leave these modules out with exclude_modules",
            OneLoRAWarning,
            stacklevel=4,
        )
