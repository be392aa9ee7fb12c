"""Models that diffusers offloads in groups: hooks around forwards, weights on the CPU or in files between calls."""

from typing import Any

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

diffusers_hooks = pytest.importorskip("diffusers.hooks")
CPU = torch.device("cpu")


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def grouped(model, level, **where):
    more: dict[str, Any] = {"num_blocks_per_group": 1} if level == "block_level" else {}
    diffusers_hooks.apply_group_offloading(model, CPU, CPU, offload_type=level, **more, **where)
    return model


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_groups_in_memory_are_as_any_model(level, tmp_path):
    model, x = fill_vectors(onelora.adapt(Blocks()), 0.5), torch.randn(2, 4)
    expected, reference, plain = model(x), merged_copy(model, torch.float64)(x.double()), merged_copy(model)(x)
    grouped(model, level)
    assert torch.equal(model(x), expected)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    onelora.merge(model)
    assert_parity(model(x), reference, plain)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_what_is_in_files_is_refused(level, tmp_path):
    model, x = fill_vectors(onelora.adapt(Blocks()), 0.5), torch.randn(2, 4)
    onelora.save_adapter(model, tmp_path / "before.safetensors")
    expected = model(x)
    grouped(model, level, offload_to_disk_path=str(tmp_path / "files"))
    assert torch.equal(model(x), expected)
    for call in (
        lambda: onelora.save_adapter(model, tmp_path / "a.safetensors"),
        lambda: onelora.merge(model),
        lambda: onelora.trainable_parameters(model),
    ):
        with pytest.raises(onelora.StateError, match="diffusers has put weights of the model into files"):
            call()
    assert not (tmp_path / "a.safetensors").exists()
    base = grouped(Blocks(), level, offload_to_disk_path=str(tmp_path / "others"))
    with pytest.raises(onelora.StateError, match="can't adapt: diffusers has put weights"):
        onelora.adapt(base)
    with pytest.raises(onelora.StateError, match="can't load an adapter: diffusers has put weights"):
        onelora.load_adapter(base, tmp_path / "before.safetensors")
