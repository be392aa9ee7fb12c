"""PEFT and transformers without what they say about nothing that the reader of an example could see or change.

PEFT imports transformers, which imports torchao wherever it is installed. torchao then logs each of its CUDA kernels
that is for another GPU or Python, and registers two enums in a way that newer PyTorch logs as deprecated. The examples
quantise nothing. Loading weights, transformers shows a bar for a part of a second and lists a pooler that is not used.
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


def import_transformers() -> ModuleType:
    """The module `transformers`.

    Raises:
        MissingExtraError: it is not installed; the message names the extra.
    """
    with without_noise_of_torchao():
        transformers = require("transformers", "demo", "load a pretrained model")
        require("transformers.modeling_utils", "demo", "load a pretrained model")  # imports torchao
    return transformers


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Weights are loaded without a bar and without a list of what the file holds besides."""
    logging_of = import_transformers().utils.logging
    level, shown = logging_of.get_verbosity(), logging_of.is_progress_bar_enabled()
    logging_of.set_verbosity_error()
    logging_of.disable_progress_bar()
    try:
        yield
    finally:
        logging_of.set_verbosity(level)
        if shown:
            logging_of.enable_progress_bar()


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
