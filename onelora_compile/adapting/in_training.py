"""What a module does in training, beside what it does in evaluation."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from onelora_compile.weight_uses.reachable_names import names_in_reach


def minds_training(module: nn.Module) -> bool:
    """Whether a call may compute something else in training: its own code, or a child such as a batch norm."""
    return any(True for _ in module.children()) or "training" in names_in_reach(module, {})


class WithoutDropout(TorchFunctionMode):
    """Dropout is no other function: what it leaves is the same on average."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand on the input of a dropout, and run anything else."""
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
