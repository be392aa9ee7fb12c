"""Processes that are forks of one that has imported what is slow to import; they see nothing of this one."""

import multiprocessing
import os
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "torch.distributed.tensor.parallel",
        "torch.distributed.fsdp",
        "onelora_compile.testing",
        "onnx",
        "onnxruntime",
        "tensorrt_double",
    ]
)


def say_into(log: Path):
    """Let what this process prints go to a file."""
    with open(log, "w") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
