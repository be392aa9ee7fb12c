"""Train vectors on several processes: DistributedDataParallel or FSDP.

torchrun --nproc_per_node 2 -m onelora_compile.examples.train_distributed --engine fsdp
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import onelora_compile as onelora

WIDTH = 32


class Block(nn.Module):
    """x + MLP(norm(x)), for x [*, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [*, WIDTH] -> [*, WIDTH]."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    """Run one process of the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--output", default="adapter.safetensors")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    train(arguments.engine, arguments.output, cuda)
    # What fully_shard made holds process groups: freed before they end, or a process may abort as it exits.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def train(engine: str, output: str, cuda: bool) -> None:
    """Adapt, wrap, train and save, in every process."""
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")

    torch.manual_seed(0)  # the same base everywhere
    model = nn.Sequential(*(Block() for _ in range(3))).to(device)
    onelora.adapt(model)  # before the wrapping: the vectors are parameters like any other then
    run: nn.Module = model
    if engine == "ddp":
        run = DistributedDataParallel(model)  # reduces the vectors only: everything else is frozen
    else:
        for block in model:
            fully_shard(block)
        fully_shard(model)

    optimizer = torch.optim.AdamW(onelora.trainable_parameters(model), lr=1e-2)
    torch.manual_seed(1 + dist.get_rank())  # other data in each process
    for step in range(60):
        x = torch.rand(64, WIDTH, device=device)
        loss = (run(x) - x.flip(-1).mean(-1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.4f}")

    if engine == "fsdp" or dist.get_rank() == 0:  # shards are gathered by all processes together
        onelora.save_adapter(model, output)


if __name__ == "__main__":
    main()
