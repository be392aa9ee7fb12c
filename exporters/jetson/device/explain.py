"""What NVIDIA's messages mean, and what to do."""

from __future__ import annotations

import re

_KNOWN = (
    (
        r"Target GPU SM \d+ is not supported|SM \d+ is not supported",
        "this TensorRT release has no kernels for this GPU: on Orin with JetPack 7 TensorRT 10.16.2 or newer is needed",
    ),
    (
        r"[Oo]ut ?[Oo]f ?[Mm]emory|cudaErrorMemoryAllocation|insufficient memory",
        "memory ran out: close other programs (also the desktop), add swap, and build with --workspace-mib 256 "
        "--optimization-level 2",
    ),
    (
        r"[Cc]ould not find any implementation for node",
        "the builder found no kernel for a part of the model. In this order try: more --workspace-mib, "
        "--optimization-level 1, a bundle with static shapes, a bundle without refit",
    ),
    (
        r"no optimization profile|at least one.*optimization profile|[Pp]rofile.*(missing|not.*set|not defined)",
        "an input has a dynamic size without a range: make the bundle again with shapes for it",
    ),
    (
        r"[Nn]o importer registered for op|UNSUPPORTED_NODE|Plugin not found",
        "this TensorRT has no such operator: export with another opset_version, or rewrite that part of the model",
    ),
    (
        r"ElementWiseOperation .* must have same input types",
        "two dtypes meet in one operator: convert the whole model (export_onnx(..., dtype=torch.float16)), not parts",
    ),
    (
        r"version tag|[Vv]ersion.*(mismatch|does not match)|not compatible.*TensorRT|incompatible.*engine|"
        r"[Ss]erialization.*(assert|[Ee]rror)",
        "the engine was built by another TensorRT or on another GPU: build it here again",
    ),
    (
        r"CUDA initialization failure|no CUDA-capable device|driver.*insufficient|cudaErrorInsufficientDriver",
        "no GPU can be reached: is this the device, does the container run with --runtime nvidia, is the user in the "
        "group 'video'?",
    ),
    (r"isRefittable|not refittable", "the engine was built without refit: build it again"),
)


def explained(messages: list[str]) -> str:
    """The runtime's own errors, each once, and what to do about those that are known."""
    unique = list(dict.fromkeys(message.strip() for message in messages if message.strip()))
    text = "\n".join(unique)
    hints = [hint for pattern, hint in _KNOWN if re.search(pattern, text)]
    lines = ["  " + message for message in unique[-12:]] or ["  (no message)"]
    return "\n".join(lines + [f"  -> {hint}" for hint in hints])
