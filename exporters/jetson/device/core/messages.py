"""From what NVIDIA's libraries say to what it means and what helps.

Builder, parser and engine return nothing where they fail, and write to the log why.
"""

from __future__ import annotations

import re
from typing import Any, Sequence

# What a remedy is called: in the options of a bundle's script, and in the arguments of `build_engine`.
WORDS = {
    "script": {
        "less": "build with --workspace-mib 256 --optimization-level 2",
        "more": "more --workspace-mib",
        "level": "--optimization-level 1",
        "static": "a bundle with static shapes",
        "no_refit": "a bundle without refit",
        "shapes": "an input has a dynamic size without a range: make the bundle again with shapes for it",
        "int8": "",  # allowed by the script itself
        "no_gpu": "no GPU can be reached: is this the device, does the container run with --runtime nvidia, is the "
        "user in the group 'video'?",
    },
    "build_engine": {
        "less": "give a smaller workspace=, a lower optimization_level=",
        "more": "a larger workspace=",
        "level": "optimization_level=2",
        "static": "static shapes",
        "no_refit": "adapters='input' in the place of 'refit'",
        "shapes": "give shapes= for the dynamic inputs",
        "int8": "a quantised model needs precision='int8' on a TensorRT without strong typing",
        "no_gpu": "",  # it depends on what was asked for
    },
}
# What a message contains (a regular expression) and what helps.  Seen in these products, or reported by their users.
_KNOWN = (
    (
        r"SM \d+ is not supported|Compute capability is invalid",
        "this TensorRT release has no kernels for this GPU: JetPack 7.2 on Orin needs TensorRT 10.16.2 or newer, of "
        "JetPack and not the one for Arm servers",
    ),
    (
        r"FP32 GEMM is not supported",
        "this GPU generation has no float32 matmul here: export the model with dtype=torch.float16",
    ),
    (
        r"HW-specific datatypes",
        "the target has no hardware for this dtype (fp8 needs SM 8.9 or newer): quantise to int8, or choose another "
        "target",
    ),
    (
        r"[Oo]ut ?[Oo]f ?[Mm]emory|MEM_ALLOC|cudaErrorMemoryAllocation|insufficient memory|Tactic Device request",
        "memory ran out: {less}, or a smaller largest shape; close other programs (on a Jetson the desktop too), and "
        "add swap",
    ),
    (r"no tactics to implement the operation within workspace limit", "give {more}"),
    (
        r"[Cc]ould not find any implementation",
        "the builder found no kernel for a part of the model, mostly for want of memory or because of refit. In this "
        "order try: {more}, {level}, {static}, {no_refit}",
    ),
    (
        r"no optimization profile|at least one.*optimization profile|[Pp]rofile.*(missing|not.*set|not defined)",
        "{shapes}",
    ),
    (
        r"Plugin not found|[Nn]o importer registered|[Uu]nsupported ONNX opset|UNSUPPORTED_NODE",
        "this TensorRT has no such operator: it may be of a newer opset than it reads. Export with a lower "
        "opset_version= (17 for TensorRT 8.6, 20 for 10.3), or rewrite that part of the model",
    ),
    (
        r"must have (the )?same (input )?types?",
        "two dtypes meet in one operator, and must agree in the ONNX: whatever cast the model left a mix; export the "
        "whole of it with dtype=torch.float16 instead",
    ),
    (
        r"importInitializers|external data|Failed to open file",
        "the weights beside the model are missing or damaged: copy its other files too",
    ),
    (
        r"input has type Int32 but must have type",
        "the bias is quantised to int32, which TensorRT does not read: quantise with onnxruntime's "
        "extra_options={{'QuantizeBias': False}}",
    ),
    (r"INT8 .*(flag|enabled)|calibrator", "{int8}"),
    (
        r"version tag|[Vv]ersion.*(mismatch|does not match)|not compatible.*TensorRT|incompatible.*engine|"
        r"[Ss]erialization.*(assert|[Ee]rror)",
        "the engine was built by another TensorRT or on another GPU: build it here again",
    ),
    (
        r"CUDA initialization failure|no CUDA-capable device|driver.*insufficient|cudaErrorInsufficientDriver",
        "{no_gpu}",
    ),
    (r"isRefittable|not refittable", "the engine was built without refit: build it again"),
)

# The steps that TensorRT may refuse, in the words of a bundle's script.
_STEPS = {
    "builder": "TensorRT gives no builder ({name})",
    "read": "TensorRT can't read the model",
    "build": "TensorRT could not build the engine",
    "runtime": "TensorRT gives no runtime ({name})",
    "load": "TensorRT can't load the engine",
    "context": "TensorRT can't make room for the engine",
    "profile": "TensorRT has no profile {name}",
    "address": "TensorRT refuses memory for {name!r}",
    "shape": "TensorRT refuses shape {name}",
    "missing": "TensorRT still asks for the weights {name}",
    "run": "the engine failed",
    "vector": "TensorRT refuses the vector {name!r}",
    "weight": "TensorRT refuses the base weight {name!r}",
    "refit": "the refit failed, the engine must be loaded again",
    "write": "TensorRT can't write the engine",
}


class EngineError(Exception):
    """Anything that the user should read as one message."""


class Refused(EngineError):
    """TensorRT refused a step.

    Attributes:
        step: which, a key of `_STEPS`.
        name: of what.
        said: what the parser said of nodes.
    """

    def __init__(self, step: str, log: Any, name: str = "", said: Sequence[str] = ()) -> None:
        self.step, self.name, self.said = step, name, tuple(said)
        super().__init__(f"{_STEPS[step].format(name=name)}:\n" + explained([*said, *log.messages.errors]))


def advice(text: str, words: str) -> list[str]:
    """What helps against known messages in a text, each once.

    Args:
        text: of TensorRT.
        words: a key of `WORDS`: how the options are called.
    """
    found = [remedy.format(**WORDS[words]) for pattern, remedy in _KNOWN if re.search(pattern, text)]
    return [one for one in dict.fromkeys(found) if one]


def explained(messages: Sequence[str]) -> str:
    """The errors, each once, and what to do about those that are known, in the options of a bundle's script."""
    unique = list(dict.fromkeys(message.strip() for message in messages if message.strip()))
    lines = ["  " + message for message in unique[-12:]] or ["  (no message)"]
    return "\n".join(lines + [f"  -> {hint}" for hint in advice("\n".join(unique), "script")])
