"""What is compiled before it runs, or in another process: aot_compile, Inductor's caches."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy

AHEAD = pytest.mark.skipif(torch.__version__ < "2.12", reason="functions have aot_compile since torch 2.12")

MODEL = """
import sys, torch
from torch import nn
import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy

def adapted(seed):
    torch.manual_seed(0)
    layers = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)
    nn.init.normal_(layers[0].bias)
    model = onelora.adapt(nn.Sequential(*layers), onelora.OneLoRAConfig(target_modules=["1", "3"]))
    return fill_vectors(model, 0.5, seed)

def call(model, x):
    return model(x)

x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
how, folder = sys.argv[1:]
"""

SAVE = """
model = adapted(0)
compiled = torch.compile(call, backend="onelora", fullgraph=True).aot_compile(((model, x), {}))
compiled.save_compiled_function(folder + "/compiled.bin")
onelora.save_adapter(adapted(5), folder + "/other.safetensors")
"""

LOAD = """
with open(folder + "/compiled.bin", "rb") as file:
    compiled = torch.compiler.load_compiled_function(file)
from torch._dynamo.utils import counters

for seed in (1, 2):
    model = adapted(seed)
    torch.testing.assert_close(compiled(model, x), merged_copy(model)(x))
onelora.load_adapter(model, folder + "/other.safetensors")
torch.testing.assert_close(compiled(model, x), merged_copy(adapted(5))(x))
with onelora.disabled(model):
    base = compiled(model, x)
torch.testing.assert_close(base, onelora.detach(adapted(0))(x))
compiled(model, x).square().sum().backward()
twin = adapted(5)
twin(x).square().sum().backward()
for name, vector in onelora.vectors(model).items():
    torch.testing.assert_close(vector.grad, onelora.vectors(twin)[name].grad, rtol=1e-4, atol=1e-4)
assert not counters["stats"], counters["stats"]  # Dynamo captured nothing here
"""

CACHED = """
from torch._dynamo.utils import counters

if how == "given":
    with open(folder + "/artifacts.bin", "rb") as file:
        assert torch.compiler.load_cache_artifacts(file.read()) is not None
model = adapted(len(how))  # other values in each process
compiled = torch.compile(model, backend="onelora", fullgraph=True)
y = compiled(x)
y.square().sum().backward()
torch.testing.assert_close(y, merged_copy(model)(x))
twin = adapted(len(how))
twin(x).square().sum().backward()
for name, vector in onelora.vectors(model).items():
    torch.testing.assert_close(vector.grad, onelora.vectors(twin)[name].grad, rtol=1e-4, atol=1e-4)
with torch.no_grad():
    torch.testing.assert_close(compiled(x), merged_copy(model)(x))
if how == "cold":
    with open(folder + "/artifacts.bin", "wb") as file:
        file.write(torch.compiler.save_cache_artifacts()[0])
autograd, inductor = counters["aot_autograd"], counters["inductor"]
print(autograd["autograd_cache_hit"], autograd["autograd_cache_miss"], autograd["autograd_cache_bypass"], end=" ")
print(inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"], inductor["fxgraph_cache_bypass"])
"""


def run(script, how, folder, cache):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning:onelora_compile", "-c", MODEL + script, how, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@AHEAD
@pytest.mark.slow
def test_a_saved_function_follows_the_vectors_of_another_process(tmp_path):
    run(SAVE, "save", tmp_path, tmp_path / "cache")
    run(LOAD, "load", tmp_path, tmp_path / "another")


@pytest.mark.slow
def test_caches_hit_in_a_new_process_with_other_vectors(tmp_path):
    """Training and inference: two graphs of AOTAutograd, three of Inductor."""
    hits, misses = ["2", "0", "0", "3", "0", "0"], ["0", "2", "0", "0", "3", "0"]
    assert run(CACHED, "cold", tmp_path, tmp_path / "cache") == misses
    assert run(CACHED, "warm", tmp_path, tmp_path / "cache") == hits  # the cache's folder is there still
    assert run(CACHED, "given", tmp_path, tmp_path / "empty") == hits  # another machine: save_cache_artifacts


def compiled_ahead(function, *args):
    compiled: Any = torch.compile(function, backend="onelora", fullgraph=True)
    return compiled.aot_compile((args, {}))


@AHEAD
def test_a_function_that_is_compiled_ahead_follows_later_values():
    model = fill_vectors(onelora.adapt(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))), 0.5)
    x = torch.randn(3, 8)
    compiled = compiled_ahead(lambda x: model(x), x)
    for seed in range(3):
        fill_vectors(model, 0.5, seed)
        torch.testing.assert_close(compiled(x), merged_copy(model)(x))


@AHEAD
def test_ahead_of_time_a_model_without_vectors_is_said_to_be_the_base():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(3, 8)
    with pytest.warns(onelora.OneLoRAWarning, match="aot_compile .* Call onelora.adapt"):
        compiled = compiled_ahead(lambda x: model(x), x)
    torch.testing.assert_close(compiled(x), model(x))
    assert not onelora.vectors(model)
