"""What kind of module, weight or argument something is."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor, nn

from onelora_compile.sharded import is_sharded

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # of which one may be a linear map of patches; none is transposed
# Names of the one module inside a wrapper: of torch.compile, checkpoint_wrapper and FullyShardedDataParallel.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def as_args(given: Any) -> tuple[Any, ...]:
    """The positional arguments of a call: those of a tuple or a list, or one value alone."""
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def finite_number(given: object) -> float | None:
    """A finite real number of Python or NumPy as a float; None for anything else, a bool too."""
    if isinstance(given, bool) or not isinstance(given, Real):
        return None
    try:
        number = float(given)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear that stores its weight as [in_features, out_features]."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an ordinary linear: `nn.Linear`, a subclass of it, or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary floating tensor, not a quantised or packed one."""
    ordinary = type(weight) in (Tensor, nn.Parameter) or is_sharded(weight)
    return ordinary and weight.is_floating_point() and weight.dtype.itemsize >= 2
