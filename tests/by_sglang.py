"""Adapters through SGLang's own code, in a process that has it: by_sglang.py FOLDER, of tests/test_sglang.py.

What it reads a folder of PEFT with, and its pool of adapters for a batch, as its server has them, and its products in
PyTorch. Of the server there is neither the model nor the scheduler.
"""

import itertools
import sys
from pathlib import Path

import torch

# The wheel of torchvision is for CUDA, and without one lacks two operators that it describes where it is imported.
VISION = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    VISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from safetensors.torch import load_file, save_file  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend, TorchNativeLoRABatchInfo  # noqa: E402
from sglang.srt.lora.lora import LoRAAdapter  # noqa: E402
from sglang.srt.lora.lora_config import LoRAConfig  # noqa: E402
from sglang.srt.lora.mem_pool import LoRAMemoryPool  # noqa: E402
from sglang.srt.lora.utils import LoRAType, get_normalized_target_modules  # noqa: E402
from sglang.srt.runtime_context import get_context, get_parallel  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

CPU = torch.device("cpu")
BATCH = (None, "a", "b")  # a request of the base, and one of each adapter


class Whole(torch.nn.Module):
    """A linear in one process, of which nothing is cut off: SGLang's own take pinned memory, which needs a GPU."""

    def slice_lora_a_weights(self, a):
        return a

    def slice_lora_b_weights(self, b):
        return b


def read(folder, config):
    adapter = LoRAAdapter(folder.name, LoRAConfig(str(folder)), config, LoadConfig(), None)
    adapter.initialize_weights()
    return adapter


def pooled(adapters, config):
    """SGLang's buffers with all adapters in them."""
    targets = get_normalized_target_modules([one for each in adapters.values() for one in each.config.target_modules])
    base = AutoModelForCausalLM.from_config(config)  # for its sizes
    pool = LoRAMemoryPool(config, len(BATCH), torch.float32, 1, targets, base, "lru", 0)
    layers = [{f"layers.{layer}.{name}": Whole() for name in targets} for layer in range(config.num_hidden_layers)]
    pool.prepare_lora_batch(set(BATCH), adapters, layers, {}, None, None)
    return pool


def served(pool, adapters, tokens):
    """Its products, told that the requests of BATCH have `tokens` rows each."""
    slots = [pool.get_buffer_id(name) for name in BATCH]
    ranks, scales = torch.zeros(len(BATCH), dtype=torch.int32), torch.zeros(len(BATCH))
    for name, adapter in adapters.items():
        ranks[pool.get_buffer_id(name)], scales[pool.get_buffer_id(name)] = adapter.config.r, adapter.scaling
    lengths = torch.full((len(BATCH),), tokens, dtype=torch.int32)
    starts = torch.arange(len(BATCH) + 1, dtype=torch.int32) * tokens
    indices = torch.tensor(slots, dtype=torch.int32)
    backend = TorchNativeLoRABackend(len(BATCH), CPU)
    backend.batch_info = TorchNativeLoRABatchInfo(
        *(False, len(BATCH), len(BATCH), starts, indices, ranks, scales, tokens, lengths),
        **{"lora_ranks_cpu": ranks, "seg_indptr_cpu": starts, "seg_lens_cpu": lengths},
        **{"weight_indices_cpu": indices, "scalings_cpu": scales},
    )
    return backend


def updates(folder):
    """What both adapters add to the outputs of each of SGLang's linears, from x.safetensors to found.safetensors."""
    config = AutoConfig.from_pretrained(folder / "base")
    adapters = {name: read(folder / name, config) for name in BATCH if name}
    pool = pooled(adapters, config)
    x = load_file(folder / "x.safetensors")
    backend = served(pool, adapters, len(next(iter(x.values()))) // len(BATCH))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = head * config.num_key_value_heads
    sizes: dict[str, tuple[int, ...]] = {"qkv_proj": (head * config.num_attention_heads, kept, kept)}
    sizes["gate_up_proj"] = (config.intermediate_size, config.intermediate_size)
    found = {}
    for layer, module in itertools.product(range(config.num_hidden_layers), sorted(pool.target_modules)):
        a, b = (pool.get_tensor(module, layer, kind) for kind in (LoRAType.LORA_A, LoRAType.LORA_B))
        parts = sizes.get(module, (config.hidden_size,))
        ends = torch.tensor([0, *itertools.accumulate(parts)])
        between = backend.run_lora_a_sgemm(x[module], a, stack_num=len(parts))
        found[f"{layer}.{module}"] = backend.run_lora_b_sgemm(between, b, ends)
    save_file(found, folder / "found.safetensors")


def main(folder):
    with get_context().override_server_args(device="cpu"), get_parallel().override(tp_rank=0):
        for model in sorted(one.parent for one in folder.glob("*/base")):
            updates(model)
        for one in sorted(folder.glob("*/refused")):
            try:
                read(one, AutoConfig.from_pretrained(one.parent / "base"))
            except KeyError as error:
                (one / "error.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
