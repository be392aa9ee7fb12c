"""DistributedDataParallel and fully_shard on two processes: gradients of one process, files that fit both."""

from pathlib import Path

import pytest
from processes import both_are_fine, torchrun

WORKER = """
import copy, os, sys, warnings
import torch, torch.distributed as dist
from torch import nn
import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy, perturb_norms

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[2]
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 33), nn.Linear(33, width)  # 33: uneven shards

    def forward(self, x):
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


torch.manual_seed(0)
base = perturb_norms(nn.Sequential(Block(), Block()))
x = torch.randn(4, 5, 16)
mine = x[2 * rank : 2 * rank + 2]
config = onelora.OneLoRAConfig(train_norms=True)


def adapted():
    return fill_vectors(onelora.adapt(copy.deepcopy(base), config), 0.1)


def steps(run, model, data, n=3):
    optimizer = torch.optim.SGD(onelora.trainable_parameters(model), lr=0.05)
    for _ in range(n):
        optimizer.zero_grad()
        run(data).square().mean().backward()
        optimizer.step()


def same(a, b, what):
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (a, b)]
    torch.testing.assert_close(*(t.detach() for t in whole), rtol=1e-4, atol=1e-6, msg=lambda m: f"{what}: {m}")


single = adapted()
steps(single, single, x)
for name, vector in onelora.vectors(single).items():
    assert (vector - onelora.vectors(adapted())[name]).abs().max() > 1e-3, name
"""

DDP = """
from torch.nn.parallel import DistributedDataParallel as DDP

how = sys.argv[1]
model = adapted()
backend = {"backend": "onelora", "options": {"inner": "aot_eager"}}
if how == "ddp":
    ddp = run = DDP(model)
elif how == "compiled_ddp":
    ddp = DDP(model)
    run = torch.compile(ddp, **backend)
else:
    model.compile(**backend)
    ddp = run = DDP(model)
reduced = set()


def record(state, bucket):
    reduced.update(id(p) for p in bucket.parameters())
    return dist.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(None, bucket)


import torch.distributed.algorithms.ddp_comm_hooks.default_hooks
ddp.register_comm_hook(None, record)
steps(run, ddp, mine)
assert reduced == {id(p) for p in onelora.trainable_parameters(model)}, len(reduced)
for name, vector in onelora.vectors(ddp).items():
    same(vector, onelora.vectors(single)[name], name)
for name, p in model.named_parameters():
    if not p.requires_grad:
        assert torch.equal(p, base.get_parameter(name)), name
assert str(onelora.summary(ddp)) == str(onelora.summary(model))
if rank == 0:
    onelora.save_adapter(ddp, folder + "/a.safetensors")
    out = onelora.load_adapter(copy.deepcopy(base), folder + "/a.safetensors")(x)
    same(out, single(x), "loaded")
print("fine", rank)
"""

FSDP = """
from torch.distributed.fsdp import fully_shard

from onelora_compile.adapting import dead_vectors

model = adapted()
before = model(x).detach()
for block in model:
    fully_shard(block)
fully_shard(model)
assert not [part for part in model.modules() if part in dead_vectors._watched]  # no hook is left to end it
same(model(x), before, "forward")
with onelora.disabled(model):
    same(model(x), base(x), "disabled")
same(model(x), before, "enabled again")
steps(model, model, mine)
for name, vector in onelora.vectors(model).items():
    same(vector, onelora.vectors(single)[name], name)
print(onelora.summary(model)) if rank == 0 else onelora.summary(model)
path = folder + "/a.safetensors"
onelora.save_adapter(model, path)
same(onelora.load_adapter(copy.deepcopy(base), path)(x), single(x), "sharded file in one process")
with torch.no_grad():
    for vector in onelora.vectors(model).values():
        vector.zero_()
onelora.load_adapter(model, path)
same(model(x), single(x), "loaded into shards")
try:
    onelora.save_adapter(model, folder + "/no/such/folder/a.safetensors")
except OSError:
    pass
else:
    raise AssertionError("saved nowhere")
for call in (onelora.detach, onelora.merge):
    try:
        call(model)
    except onelora.StateError as error:
        assert "sharded over processes" in str(error)
    else:
        raise AssertionError(call)
other = copy.deepcopy(base)
fully_shard(other)
for call in (onelora.adapt, lambda m: onelora.load_adapter(m, path)):
    try:
        call(other)
    except onelora.StateError as error:
        assert "before fully_shard" in str(error)
    else:
        raise AssertionError(call)
print("fine", rank)
"""

FSDP1 = """
from torch.distributed.fsdp import FullyShardedDataParallel

config = onelora.OneLoRAConfig(target_modules=["up", "down"], train_norms=True)


def sharded(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def refused(call, words):
    try:
        call()
    except onelora.StateError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)


refused(lambda: sharded(onelora.adapt(copy.deepcopy(base))), "shard with torch.distributed.fsdp.fully_shard")
other = sharded(copy.deepcopy(base))
for model in (other, other.module):
    refused(lambda: onelora.adapt(model), "FullyShardedDataParallel has split over processes")
single = adapted()
model = adapted()
before = model(x).detach()
run = sharded(model)
same(run(x), before, "forward")
steps(single, single, x)
steps(run, run, mine)
same(run(x), single(x), "trained")
path = folder + "/a.safetensors"
calls = [onelora.summary, onelora.merge, onelora.detach, onelora.disabled, lambda m: onelora.save_adapter(m, path)]
for call in calls:
    for one in (run, model):
        refused(lambda: call(one).__enter__() if call is onelora.disabled else call(one), "summon_full_params")
with FullyShardedDataParallel.summon_full_params(run, writeback=False):
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, base.get_parameter(name)), name
    onelora.save_adapter(model, path)
same(onelora.load_adapter(copy.deepcopy(base), path)(x), single(x), "loaded in one process")
print("fine", rank)
"""


@pytest.mark.parametrize("how", ["ddp", "compiled_ddp", "ddp_of_compiled"])
def test_ddp_reduces_only_what_is_trained(how, tmp_path):
    both_are_fine(WORKER + DDP, tmp_path, how, tmp_path)


def test_fully_shard(tmp_path):
    both_are_fine(WORKER + FSDP, tmp_path, "fsdp", tmp_path)


def test_fully_sharded_data_parallel_trains_what_was_adapted_before_and_is_refused_else(tmp_path):
    both_are_fine(WORKER + FSDP1, tmp_path, "fsdp1", tmp_path)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_example(engine, tmp_path):
    from onelora_compile.examples import train_distributed

    done = torchrun(Path(train_distributed.__file__), "--engine", engine, "--output", tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.9 * losses[0]
    assert (tmp_path / "a.safetensors").is_file()
