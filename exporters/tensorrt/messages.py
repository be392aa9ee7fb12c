"""From what NVIDIA's libraries say to an error that says what to do.

The builder and the parser return nothing where they fail, and write to the log why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from onelora_compile.errors import ExportError
from onelora_compile.exporters.tensorrt.library import Api

# What a message contains (a regular expression) and what helps. Seen in these products, or reported by their users.
_KNOWN: tuple[tuple[str, str], ...] = (
    (
        r"Target GPU SM \d+ is not supported|Compute capability is invalid",
        "This release has no kernels for this GPU. JetPack 7.2 on Orin needs TensorRT 10.16 of JetPack, not the one "
        "for Arm servers",
    ),
    (
        r"FP32 GEMM is not supported",
        "This GPU generation has no float32 matmul here: export the model with dtype=torch.float16",
    ),
    (
        r"HW-specific datatypes",
        "The target has no hardware for this dtype (fp8 needs SM 8.9 or newer): quantise to int8, or choose another "
        "target",
    ),
    (
        r"[Oo]ut ?[Oo]f ?[Mm]emory|MEM_ALLOC|insufficient memory|Tactic Device request",
        "Memory: give a smaller workspace=, a lower optimization_level=, a smaller largest shape; on a Jetson stop the "
        "desktop and add swap",
    ),
    (
        r"no tactics to implement the operation within workspace limit",
        "Give a larger workspace=",
    ),
    (
        r"Could not find any implementation",
        "Mostly memory or refit: try a larger workspace=, static shapes, optimization_level=2, adapters='input' in the "
        "place of 'refit'",
    ),
    (
        r"no optimization profile has been defined",
        "Give shapes= for the dynamic inputs",
    ),
    (
        r"Plugin not found|No importer registered|[Uu]nsupported ONNX opset|UNSUPPORTED_NODE",
        "This TensorRT has no such operator: it may be of a newer opset than it reads. Export with a lower "
        "opset_version= (17 for TensorRT 8.6, 20 for 10.3)",
    ),
    (
        r"must have (the )?same (input )?types?",
        "Engines are strongly typed, so the dtypes of an operator's inputs must agree in the ONNX: whatever cast the "
        "model left a mix; export it with dtype=torch.float16 instead",
    ),
    (
        r"importInitializers|external data|Failed to open file",
        "The weights beside the model are missing or damaged: copy its other files too",
    ),
    (
        r"input has type Int32 but must have type",
        "The bias is quantised to int32, which TensorRT does not read: quantise with onnxruntime's "
        "extra_options={'QuantizeBias': False}",
    ),
    (
        r"INT8 .*(flag|enabled)|calibrator",
        "A quantised model needs precision='int8' on a TensorRT without strong typing",
    ),
)
_NO_GPU = r"CUDA driver version is insufficient|no CUDA-capable device|libcuda|cudaError 35|cudaError 100"
_REFIT_ON_CPU = r"graph_jit\.cpp|is not found in the accelerator list"


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
    advice = [help_ for pattern, help_ in _KNOWN if re.search(pattern, text)]
    if refit and re.search(_REFIT_ON_CPU, text):
        advice.append("A refittable engine can be built only where the GPU is")
    elif re.search(_NO_GPU, text) and not advice and not details:
        advice.append(
            "There is no GPU (or its driver is too old): name target='sm_86' to build for a device that is elsewhere"
            if api.capabilities
            else "TensorRT builds engines on the device that runs them: run this there, or build with TensorRT-RTX"
        )
    telling = [one for one in said if not re.search(_NO_GPU, one)] or said  # without a GPU every error says so too
    shown = "; ".join(" ".join(one.split()) for one in telling[-5:])
    return ExportError(f"{what}: {api.title} says: {shown}" + "".join(f". {one}" for one in dict.fromkeys(advice)))
