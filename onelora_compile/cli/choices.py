"""What an option can be, where it is one of a few: help, shell completion and the check know them so.

Written down once more than in the exporters, as those import PyTorch; `tests/test_cli_help.py` compares.
"""

import enum


class ExportMode(enum.StrEnum):
    """Where the vectors of an exported model are."""

    FOLD = "fold"
    LOAD = "load"
    INPUT = "input"
    BANK = "bank"


class PeftFormat(enum.StrEnum):
    """The forms of an adapter that PEFT reads."""

    PEFT = "peft"
    PEFT_MISS = "peft-miss"


class Runtime(enum.StrEnum):
    """What reads an exported file."""

    ONNX = "onnx"
    PT2 = "pt2"
    AOTI = "aoti"
    EXECUTORCH = "executorch"
    OPENVINO = "openvino"


class EngineMode(enum.StrEnum):
    """Where the vectors of an engine are."""

    FOLD = "fold"
    INPUT = "input"
    BANK = "bank"
    REFIT = "refit"


class Precision(enum.StrEnum):
    """What an engine may compute in besides float32."""

    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


class Flavour(enum.StrEnum):
    """Which TensorRT builds."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    RTX = "rtx"


class Swap(enum.StrEnum):
    """How a device takes another adapter."""

    AUTO = "auto"
    INPUT = "input"
    REFIT = "refit"


class BundleLayout(enum.StrEnum):
    """For which runtime on a device."""

    PLAIN = "plain"
    TRITON = "triton"
    DEEPSTREAM = "deepstream"
    ISAAC_ROS = "isaac-ros"


class JetPack(enum.StrEnum):
    """NVIDIA's system on a Jetson."""

    V5_1 = "5.1"
    V6_0 = "6.0"
    V6_1 = "6.1"
    V6_2 = "6.2"
    V7_0 = "7.0"
    V7_1 = "7.1"
    V7_2 = "7.2"
