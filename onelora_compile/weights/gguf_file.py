"""Adapters as llama.cpp's GGUF files: LoRA of r = 1 whose lora_a is ones.

    <tensor>.weight.lora_a   float32 [1, in_features], of ones
    <tensor>.weight.lora_b   float32 [out_features, 1], the vector
    general.type = adapter, general.architecture of the base, adapter.type = lora, adapter.lora.alpha = 1

Source: `convert_lora_to_gguf.py` of llama.cpp, as in llama-cpp-python 0.3.36, and its reader, `llama-adapter.cpp`.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from onelora_compile.errors import ConfigError
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_content import AdapterFile
from onelora_compile.weights.gguf_layout import GgufLayout, the_package
from onelora_compile.weights.peft_config import LORA
from onelora_compile.weights.peft_tensors import check_layers

GGUF = "gguf"  # the format of save_adapter


def write_gguf(file: AdapterFile, path: Path, layout: GgufLayout) -> None:
    """Write an adapter for llama.cpp, to a path that nothing reads yet (`replacing`).

    Args:
        file: the adapter.
        path: the file.
        layout: of its base.

    Raises:
        ConfigError: llama.cpp has no place for a part of the adapter, which is named.
        MissingExtraError: the package gguf is not installed.
    """
    gguf = the_package()
    tensors = _tensors(file, layout)
    writer = gguf.GGUFWriter(path, layout.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _tensors(file: AdapterFile, layout: GgufLayout) -> dict[str, np.ndarray]:
    if file.saved:
        raise ConfigError(
            f"llama.cpp has no place for {shortened(file.saved)}, which was trained besides the vectors: its adapters "
            "are on linears alone. Merge the adapter into the model, onelora.merge, and convert that"
        )
    check_layers(file, LORA, "llama.cpp", GGUF)
    tensors: dict[str, np.ndarray] = {}
    for name, vector in file.vectors.items():
        inputs = file.layers[name].inputs
        assert inputs is not None
        key = layout.name(name)
        tensors[f"{key}.lora_a"] = np.ones((1, prod(inputs)), np.float32)
        tensors[f"{key}.lora_b"] = layout.rows(name, vector).reshape(-1, 1).contiguous().numpy()
    return tensors
