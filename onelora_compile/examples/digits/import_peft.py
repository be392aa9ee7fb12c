"""PEFT without what torchao says while it is imported.

PEFT imports transformers, which imports torchao wherever it is installed. torchao then logs each of its CUDA kernels
that is for another GPU or Python, and registers two enums in a way that newer PyTorch logs as deprecated. The demo
quantises nothing, so these lines are about nothing that its reader could see or change.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import ModuleType

from onelora_compile.errors import require

# The logger of each line, and how the line begins.
_NOISE = {"torchao": "Failed to load ", "torch.utils._pytree": "%s is an Enum subclass and is now natively supported"}


def import_peft() -> ModuleType:
    """The module `peft`.

    Raises:
        MissingExtraError: it is not installed; the message names the extra.
    """
    with without_noise_of_torchao():
        return require("peft", "demo", "compare with LoRA and MiSS")


@contextlib.contextmanager
def without_noise_of_torchao() -> Iterator[None]:
    """Leave out those lines, and no others, of whoever imports torchao inside."""
    with contextlib.ExitStack() as stack:
        for name, beginning in _NOISE.items():
            chosen = _Without(beginning)
            logger = logging.getLogger(name)
            logger.addFilter(chosen)
            stack.callback(logger.removeFilter, chosen)
        yield


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginning)
