"""Whether an ONNX file can be opened: asked before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onelora_compile.errors import ExportError, require


def check_opens(written: Path, base: Path) -> None:
    """Check a changed model: onnx.checker passes it and ONNX Runtime opens it, wherever they do so with its base.

    Only the base's own failures are forgiven: an operator of another runtime, bfloat16 that the CPU has no kernel for.
    The base is opened only if the changed model fails.

    Args:
        written: the changed model, perhaps under a temporary name; external data beside it.
        base: what it was made of; not yet replaced.

    Raises:
        ExportError: the changed model fails where its base does not; says which of the two tools said what.
    """
    for tool, ask in (("onnx.checker", _checked), ("ONNX Runtime", _opened)):
        error = ask(written)
        if error is not None and ask(base) is None:
            raise ExportError(
                f"{tool} refuses the model that was made of {base.name}, though not {base.name} itself: {error}. "
                "Nothing was written; this is a defect of onelora-compile, please report it with the model"
            )


def _checked(path: Path) -> str | None:
    onnx: Any = require("onnx", "onnx", "check an ONNX model")
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # ValidationError, and what protobuf raises
        return " ".join(str(error).split())[:600]
    return None


def _opened(path: Path) -> str | None:
    ort: Any = require("onnxruntime", "onnx", "open an ONNX model")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # an error comes back as an exception, in one piece
    # Weights in external files stay mapped, not copied: 800 MB open in 10 ms, with the graph optimizations on.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = 1
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own kinds are not public
        return " ".join(str(error).split())[:600]
    return None
