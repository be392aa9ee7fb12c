"""How llama.cpp lays out the linears of a model: its names of them, and the order of their rows.

    names   those of the package gguf: model.layers.0.self_attn.q_proj -> blk.0.attn_q
    rows    llama.cpp rotates neighbours where transformers rotates halves. So its converter interleaves the two halves
            of each head in the q and k of the Llama family, and a vector on such a row goes with it
    back    several of transformers' names are one of llama.cpp's, so what an adapter is on is looked up in a table

Source: `convert_lora_to_gguf.py` and `conversion/` of llama.cpp, as in llama-cpp-python 0.3.36: the architectures below
are those whose linears it renames and reorders, and changes in no other way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from onelora_compile.errors import ConfigError, require
from onelora_compile.weights.adapter_content import CONV1D, Layer

# llama.cpp's name of an architecture by transformers' model_type.
ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "smollm3": "smollm3", "granite": "granite", "olmo": "olmo"},
    **{"qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"},
    **{"phi3": "phi3", "starcoder2": "starcoder2", "olmo2": "olmo2", "olmo3": "olmo2", "gpt2": "gpt2"},
}
_INTERLEAVED = {"llama", "smollm3", "granite", "olmo"}
_HEAD, _OUTPUT = "lm_head", "output.weight"
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
# transformers' names of the linears of a layer, by llama.cpp's architecture, where they are not those of a Llama.
_LLAMA = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LINEARS = {
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "starcoder2": (*_ATTENTION, "mlp.c_fc", "mlp.c_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}


@dataclasses.dataclass(frozen=True)
class GgufLayout:
    """A base as llama.cpp has it.

    Attributes:
        architecture: llama.cpp's name.
        blocks: how many layers.
        heads: of how many heads the rows of a linear are interleaved, by the last part of its name.
        own_head: whether the output head is known to have a weight of its own, and not the embedding's.
        source: what tells all this, for messages.
    """

    architecture: str
    blocks: int
    heads: Mapping[str, int]
    own_head: bool
    source: str

    def name(self, module: str) -> str:
        """llama.cpp's name of the weight of a linear.

        Raises:
            ConfigError: it has none.
        """
        found = self._names().get_name(module)
        if found is None:
            raise ConfigError(
                f"llama.cpp has no tensor for {module!r} in a {self.architecture} of {self.blocks} layers "
                f"({self.source}): adapt the model without it (exclude_modules)"
            )
        if module == _HEAD and not self.own_head:
            raise ConfigError(
                f"{self.source} does not say that {module!r} is not tied to the embedding, and then llama.cpp has no "
                "tensor for it: give the base's own .gguf (--base), or adapt the model without it (exclude_modules)"
            )
        return f"{found}.weight"

    def modules(self) -> dict[str, str]:
        """The linears of such a base, by llama.cpp's names of their weights."""
        names, blocks = self._names(), "transformer.h" if self.architecture == "gpt2" else "model.layers"
        linears = _LINEARS.get(self.architecture, _LLAMA)
        held = (f"{blocks}.{number}.{linear}" for number in range(self.blocks) for linear in linears)
        return {f"{names.get_name(one)}.weight": one for one in held} | {_OUTPUT: _HEAD}

    def layer(self, module: str, layer: Layer) -> Layer:
        """What a vector is on; a file of llama.cpp does not tell a Conv1D from a linear."""
        turned = self.architecture == "gpt2" and module != _HEAD
        return dataclasses.replace(layer, kind=CONV1D) if turned else layer

    def rows(self, module: str, values: Tensor) -> Tensor:
        """Values for each row of a linear, [out_features, *], in llama.cpp's order.

        Raises:
            ConfigError: they are not of so many heads.
        """
        heads = self._heads(module, values)
        return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else values

    def rows_back(self, module: str, values: Tensor) -> Tensor:
        """The inverse of `rows`."""
        heads = self._heads(module, values)
        return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else values

    def _heads(self, module: str, values: Tensor) -> int:
        """Of how many heads the rows are interleaved; 0 where they stay."""
        heads = self.heads.get(module.rpartition(".")[2], 0)
        if heads and len(values) % (2 * heads):
            raise ConfigError(f"{self.source}: {heads} heads, of which {module!r} with {len(values)} rows is not")
        return heads

    def _names(self) -> Any:
        gguf = the_package()
        key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.get_tensor_name_map(key, self.blocks)


def the_package() -> ModuleType:
    """The package gguf.

    Raises:
        MissingExtraError: it is not installed.
    """
    return require("gguf", "gguf", "read and write adapters of llama.cpp")


def open_file(path: Path, error: type[Exception]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The tensors of a GGUF file, and its fields, by name; without its tokenizer.

    Args:
        path: the file, which is there.
        error: what to raise where it is no such file, or is damaged.
    """
    gguf = the_package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    except Exception as found:  # the package checks little: whatever indexing and NumPy raise
        raise error(f"{path} is not a GGUF file, or is damaged: {found}") from found
    return {tensor.name: tensor for tensor in reader.tensors}, fields


def layout_of_adapter(fields: Mapping[str, Any], tensors: Iterable[str], path: Path, ordered: bool) -> GgufLayout:
    """The layout of the base of an adapter, from the adapter alone; without the order of rows unless `ordered`.

    Raises:
        ConfigError: that does not tell it.
    """
    architecture = str(fields.get("general.architecture"))
    if architecture not in ARCHITECTURES.values():
        known = ", ".join(dict.fromkeys(ARCHITECTURES.values()))
        raise ConfigError(f"{path}: what llama.cpp makes of a {architecture!r} is not known here. Known are {known}")
    if ordered and architecture in _INTERLEAVED:
        raise ConfigError(
            f"{path}: the order of its rows depends on the heads of its base, a {architecture}: give that, its folder, "
            "config.json or .gguf (base= of read_adapter, convert_adapter, combine; onelora convert, onelora combine "
            "--base), or load the adapter into the model"
        )
    numbers = [int(name.split(".")[1]) for name in tensors if re.match(r"blk\.\d{1,6}\.", name)]
    return GgufLayout(architecture, max(numbers, default=-1) + 1, {}, True, str(path))


def layout_of_config(fields: Mapping[str, Any], source: str) -> GgufLayout:
    """The layout of a base from its configuration, as transformers writes it.

    Args:
        fields: of `config.json`.
        source: what messages call it.

    Raises:
        ConfigError: an architecture that is not known here, or sizes are missing.
    """
    kind = fields.get("model_type")
    architecture = ARCHITECTURES.get(str(kind))
    if architecture is None:
        raise ConfigError(
            f"{source}: what llama.cpp makes of model_type={kind!r} is not known here. Known are "
            f"{', '.join(ARCHITECTURES)}; for others write a folder of PEFT (--to peft) and give it to llama.cpp's "
            "convert_lora_to_gguf.py"
        )
    blocks = fields.get("num_hidden_layers", fields.get("n_layer"))
    heads = fields.get("num_attention_heads", fields.get("n_head"))
    grouped = fields.get("num_key_value_heads") or heads
    sizes = {"num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": grouped}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{source}: {name} is {value!r}, and the layout needs it")
    tied = fields.get("tie_word_embeddings")
    return GgufLayout(architecture, blocks, interleaved_heads(architecture, heads, grouped), tied is False, source)


def layout_of_model(root: nn.Module) -> GgufLayout:
    """The layout of a model of transformers.

    Raises:
        ConfigError: it has no configuration, or as `layout_of_config`.
    """
    to_dict = getattr(getattr(root, "config", None), "to_dict", None)
    return layout_of_config(to_dict() if to_dict else {}, type(root).__name__)


def interleaved_heads(architecture: str, heads: int, grouped: int) -> dict[str, int]:
    """The `heads` of a layout, from the heads of q and those of k."""
    return {"q_proj": heads, "k_proj": grouped} if architecture in _INTERLEAVED else {}
