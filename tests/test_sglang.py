"""Folders of PEFT in SGLang's reader, its pool of adapters and its products in PyTorch: make test-servers."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import gguf_files
import pytest
import torch
from safetensors.torch import load_file, save_file

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter
from onelora_compile.testing import assert_parity, fill_vectors

INSTALLED = Path(sys.prefix, "sglang")  # beside the packages: torchvision, which it needs, hides from vLLM
pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(not INSTALLED.is_dir(), reason="sglang is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
KINDS = ["llama", "qwen2", "phi3"]
TOKENS = 16  # of each request: of the base, of a and of b
STACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LEFT_OUT = {"llama": "k_proj", "qwen2": "o_proj", "phi3": "down_proj"}  # of b


def models(base, kind):
    """Adapted twice: all linears, and all but some."""
    rest = onelora.OneLoRAConfig(exclude_modules=[LEFT_OUT[kind]])
    made = [onelora.adapt(copy.deepcopy(base), config) for config in (onelora.OneLoRAConfig(), rest)]
    return [fill_vectors(model, 0.05, seed) for seed, model in enumerate(made)]


def inputs(config):
    """One input for each of SGLang's linears, [base's, a's and b's tokens, in_features]."""
    wide = {"down_proj": config.intermediate_size}
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    return {name: torch.randn(3 * TOKENS, wide.get(name, config.hidden_size)) for name in names}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folders of three models, each with the adapted models, the inputs and what SGLang made of them."""
    folder = tmp_path_factory.mktemp("sglang")
    kept = {}
    for kind in KINDS:
        base = gguf_files.model_of(kind)
        base.save_pretrained(folder / kind / "base")
        kept[kind] = models(base, kind), inputs(base.config)
        (a, b), x = kept[kind]
        onelora.save_adapter(a, folder / kind / "a", format="peft")
        onelora.save_adapter(b, folder / kind / "b.safetensors")
        convert_adapter(folder / kind / "b.safetensors", folder / kind / "b")
        save_file(x, folder / kind / "x.safetensors")
    part = onelora.adapt(gguf_files.model_of("llama"), onelora.OneLoRAConfig(target_modules=["q_proj", "k_proj"]))
    onelora.save_adapter(part, folder / "llama" / "refused", format="peft")
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("by_sglang.py"), folder]
    settings = {"PYTHONPATH": str(INSTALLED)}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, kept


def updates(model, name, layer, x, dtype):
    """b * sum(x) of the linears that SGLang has as one, as a product with ones; zeros of those without a vector."""
    linears, vectors = dict(model.named_modules()), onelora.vectors(model)
    room = f"model.layers.{layer}.{'self_attn' if name in ('qkv_proj', 'o_proj') else 'mlp'}"
    names = [f"{room}.{name}"] if f"{room}.{name}" in linears else [f"{room}.{part}" for part in STACKED[name]]
    b = torch.cat([vectors.get(one, torch.zeros(linears[one].out_features)).detach() for one in names])
    return x.to(dtype) @ torch.ones(x.shape[1], 1, dtype=dtype) * b.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_of_a_batch_gets_its_own_vectors(kind, run):
    folder, kept = run
    (a, b), x = kept[kind]
    found = load_file(folder / kind / "found.safetensors")
    layers = range(a.config.num_hidden_layers)
    assert set(found) == {f"{layer}.{name}" for layer in layers for name in x}
    for layer, (name, given) in itertools.product(layers, x.items()):
        of_base, of_a, of_b = found[f"{layer}.{name}"].split(TOKENS)
        assert not of_base.any()
        for got, model, rows in ((of_a, a, given[TOKENS:-TOKENS]), (of_b, b, given[-TOKENS:])):
            exact, plain = (updates(model, name, layer, rows, dtype) for dtype in (torch.float64, torch.float32))
            assert_parity(got, exact, plain, f"{layer}.{name}")


def test_q_without_v_is_not_read_by_sglang(run):
    folder, _ = run
    assert "v_proj" in (folder / "llama" / "refused" / "error.txt").read_text()
