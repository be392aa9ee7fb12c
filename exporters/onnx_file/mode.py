"""The modes of an ONNX model that carries vectors, by name."""

from typing import Literal, get_args

Mode = Literal["fold", "load", "input", "bank"]
MODES: tuple[str, ...] = get_args(Mode)
IDS = "adapter_ids"  # name of the input of a bank
