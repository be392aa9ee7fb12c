"""1LoRA as a compiler feature: y = W x + c + b * sum(x), one trained vector b per frozen linear.

    import onelora_compile as onelora

    model = onelora.adapt(model)
    model = torch.compile(model, backend="onelora")
    optimizer = torch.optim.AdamW(onelora.trainable_parameters(model), lr=1e-3)

Method: Quercia et al., arXiv 2503.08333.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from onelora_compile.version import __version__

if TYPE_CHECKING:
    from onelora_compile.public import *

__all__ = [
    "AdapterFileError",
    "AdapterInfo",
    "BaseMismatchError",
    "ConfigError",
    "ExportError",
    "HubError",
    "MergeError",
    "MissingExtraError",
    "OneLoRAConfig",
    "OneLoRAError",
    "OneLoRAWarning",
    "PassError",
    "StateError",
    "TargetError",
    "__version__",
    "adapt",
    "adapters",
    "add_adapter",
    "combine",
    "delete_adapter",
    "detach",
    "diagnose",
    "disabled",
    "explain",
    "load_adapter",
    "merge",
    "model_card",
    "parameter_groups",
    "push_to_hub",
    "read_adapter",
    "row_parameters",
    "rows",
    "save_adapter",
    "set_adapter",
    "summary",
    "trainable_parameters",
    "vectors",
]


def _load() -> None:
    """Import the names of `public.py`; that takes PyTorch, seconds of it."""
    from onelora_compile import public

    globals().update({name: getattr(public, name) for name in __all__})


if not TYPE_CHECKING:  # a type checker knows the names, and should miss all others

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _load()
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


# `onelora --help` must not wait for PyTorch, so nothing above imports it. In any other program the operators are
# registered at once: `torch.export.load` needs them, and asks for no name of this package. While Python looks for
# the package of `python -m onelora_compile`, the name of the program is "-m".
_PROGRAM = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
if "torch" in sys.modules or _PROGRAM not in ("onelora", "onelora.exe", "-m"):
    _load()
