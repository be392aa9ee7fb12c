"""The public names, in the order in which they may be imported."""

from onelora_compile import ops as ops  # first: everything else needs the operators registered
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
from onelora_compile.many_adapters.names import AdapterInfo, adapters, add_adapter, delete_adapter, set_adapter
from onelora_compile.many_adapters.row_training import row_parameters
from onelora_compile.many_adapters.rows_block import rows
from onelora_compile.report.diagnose import diagnose
from onelora_compile.report.explain import explain
from onelora_compile.report.summary import summary
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_file import read_adapter, save_adapter
from onelora_compile.weights.combine import combine
from onelora_compile.weights.loading import load_adapter
from onelora_compile.weights.merge import merge

__all__ = [
    "AdapterFileError",
    "AdapterInfo",
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
    "read_adapter",
    "row_parameters",
    "rows",
    "save_adapter",
    "set_adapter",
    "summary",
    "trainable_parameters",
    "vectors",
]
