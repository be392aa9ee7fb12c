"""The public names, in the order in which they may be imported; each as itself, for type checkers."""

from onelora_compile import ops as ops  # first: everything else needs the operators registered
from onelora_compile.adapting.adapter import adapt as adapt
from onelora_compile.adapting.adapter import detach as detach
from onelora_compile.adapting.adapter import trainable_parameters as trainable_parameters
from onelora_compile.adapting.adapter import vectors as vectors
from onelora_compile.adapting.config import OneLoRAConfig as OneLoRAConfig
from onelora_compile.adapting.disabled_block import disabled as disabled
from onelora_compile.errors import AdapterFileError as AdapterFileError
from onelora_compile.errors import BaseMismatchError as BaseMismatchError
from onelora_compile.errors import ConfigError as ConfigError
from onelora_compile.errors import ExportError as ExportError
from onelora_compile.errors import MergeError as MergeError
from onelora_compile.errors import MissingExtraError as MissingExtraError
from onelora_compile.errors import OneLoRAError as OneLoRAError
from onelora_compile.errors import OneLoRAWarning as OneLoRAWarning
from onelora_compile.errors import PassError as PassError
from onelora_compile.errors import StateError as StateError
from onelora_compile.errors import TargetError as TargetError
from onelora_compile.many_adapters.names import AdapterInfo as AdapterInfo
from onelora_compile.many_adapters.names import adapters as adapters
from onelora_compile.many_adapters.names import add_adapter as add_adapter
from onelora_compile.many_adapters.names import delete_adapter as delete_adapter
from onelora_compile.many_adapters.names import set_adapter as set_adapter
from onelora_compile.many_adapters.row_training import row_parameters as row_parameters
from onelora_compile.many_adapters.rows_block import rows as rows
from onelora_compile.report.diagnose import diagnose as diagnose
from onelora_compile.report.explain import explain as explain
from onelora_compile.report.summary import summary as summary
from onelora_compile.version import __version__ as __version__
from onelora_compile.weights.adapter_file import read_adapter as read_adapter
from onelora_compile.weights.adapter_file import save_adapter as save_adapter
from onelora_compile.weights.combine import combine as combine
from onelora_compile.weights.loading import load_adapter as load_adapter
from onelora_compile.weights.merge import merge as merge
