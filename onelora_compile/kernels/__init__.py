"""Kernels in Triton, and the operators that call them; importable without Triton (`why_not`)."""

from __future__ import annotations

import importlib.util
import os

import torch

NO_TRITON = "Triton is not installed (it comes with CUDA builds of torch; pip install triton)"
NO_GPU = "Triton needs a CUDA GPU"


def why_not(device: torch.device) -> str | None:
    """Why kernels can't run on tensors of this device; None if they can.

    With TRITON_INTERPRET=1 in the environment they run on the CPU, slowly.
    """
    if importlib.util.find_spec("triton") is None:
        return NO_TRITON
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return NO_GPU
    return None if torch.cuda.get_device_capability(device) >= (8, 0) else "the kernel needs sm_80 or newer"


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
