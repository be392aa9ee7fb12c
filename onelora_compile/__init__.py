"""1LoRA as a compiler feature: y = W x + c + b * sum(x), one trained vector b per frozen linear.

    import onelora_compile as onelora

    model = onelora.adapt(model)
    model = torch.compile(model, backend="onelora")
    optimizer = torch.optim.AdamW(onelora.trainable_parameters(model), lr=1e-3)

Method: Quercia et al., arXiv 2503.08333.
"""

import torch as _torch

from onelora_compile import ops as ops  # first: everything else needs the operators registered
from onelora_compile import torch_versions as _torch_versions
from onelora_compile.adapting.adapter import adapt, detach, trainable_parameters, vectors
from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.adapting.disabled_block import disabled
from onelora_compile.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    ExportError,
    MergeError,
    MissingExtraError,
    OneLoRAError,
    OneLoRAWarning,
    PassError,
    StateError,
    TargetError,
)
from onelora_compile.report.explain import explain
from onelora_compile.report.summary import summary
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_file import load_adapter, read_adapter, save_adapter
from onelora_compile.weights.merge import merge

__all__ = [
    "AdapterFileError",
    "BaseMismatchError",
    "ConfigError",
    "ExportError",
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
    "detach",
    "disabled",
    "explain",
    "load_adapter",
    "merge",
    "read_adapter",
    "save_adapter",
    "summary",
    "trainable_parameters",
    "vectors",
]

_torch_versions.warn_if_untested(str(_torch.__version__))
