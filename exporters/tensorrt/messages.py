"""From what NVIDIA's libraries say to an error of this package that says what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from onelora_compile.errors import ExportError
from onelora_compile.exporters.jetson.device.core.messages import Refused, advice
from onelora_compile.exporters.tensorrt.library import Api

_NO_GPU = r"CUDA driver version is insufficient|no CUDA-capable device|libcuda|cudaError 35|cudaError 100"
_REFIT_ON_CPU = r"graph_jit\.cpp|is not found in the accelerator list"
# The steps that TensorRT may refuse (`Refused.step`), as the beginning of a sentence.
_STEPS = {
    "builder": "no builder ({name})",
    "read": "{path} can't be read",
    "build": "{path} can't be built into an engine",
    "runtime": "{path} can't be loaded ({name})",
    "load": "{path} can't be loaded",
    "context": "{path}: no execution context",
    "profile": "{path} has no profile {name}",
    "address": "{path}: no address for {name!r}",
    "run": "{path} can't be run",
    "vector": "{path}: the vector of {name!r} can't be set",
    "weight": "{path}: the base weight {name!r} can't be set",
    "missing": "{path}: TensorRT still asks for {name}; build it with adapters='input'",
    "refit": "{path} can't be refitted",
}


@contextlib.contextmanager
def in_our_words(path: Path, api: Api, *, refit: bool = False) -> Iterator[None]:
    """A block of steps with the model or engine at `path`, in which what TensorRT refuses is an `engine_error`.

    Raises:
        ExportError: TensorRT refused a step.
    """
    try:
        yield
    except Refused as refused:
        what = _STEPS[refused.step].format(path=path, name=refused.name)
        raise engine_error(what, api, refused.said, refit=refit) from refused


def engine_error(what: str, api: Api, details: Sequence[str] = (), *, refit: bool = False) -> ExportError:
    """The error for a step that TensorRT refused.

    Args:
        what: the step and the file, as the beginning of a sentence.
        api: whose messages explain it.
        details: what the parser said of nodes.
        refit: whether the engine was to be refittable.
    """
    said = list(dict.fromkeys([*details, *api.messages.errors])) or [
        f"{api.title} gave no reason: its messages go to the first logger of a process, which another package made"
    ]
    text = "\n".join(said)
    helps = [one[0].upper() + one[1:] for one in advice(text, "build_engine")]
    if refit and re.search(_REFIT_ON_CPU, text):
        helps.append("A refittable engine can be built only where the GPU is")
    elif re.search(_NO_GPU, text) and not helps and not details:
        helps.append(
            "There is no GPU (or its driver is too old): name target='sm_86' to build for a device that is elsewhere"
            if api.capabilities
            else "TensorRT builds engines on the device that runs them: run this there, or build with TensorRT-RTX"
        )
    telling = [one for one in said if not re.search(_NO_GPU, one)] or said  # without a GPU every error says so too
    shown = "; ".join(" ".join(one.split()) for one in telling[-5:])
    return ExportError(f"{what}: {api.title} says: {shown}" + "".join(f". {one}" for one in helps))
