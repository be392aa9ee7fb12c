"""Heads in sums of adapters that began at random, or whose beginning, dtype, shape or names differ."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import onelora_compile as onelora
from onelora_compile.weights.adapter_file import write_adapter


def headed(path, seed=0, dtype=None):
    """A classifier whose head begins at random, another one for each seed."""
    torch.manual_seed(0)
    body = nn.Linear(4, 6)
    torch.manual_seed(100 + seed)
    model = nn.Sequential(body, nn.Linear(6, 3).to(dtype))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    onelora.adapt(model, onelora.OneLoRAConfig(modules_to_save=["1"]))
    with torch.no_grad():
        for parameter in onelora.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    onelora.save_adapter(model, path)
    return start


def test_new_heads_do_not_add_but_one_can_be_taken(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    headed(a, 1)
    headed(b, 2)
    with pytest.raises(onelora.BaseMismatchError, match=r"trained 1\.weight.*from different values.*at random"):
        onelora.combine({a: 0.5, b: 0.5}, trained="add")
    made = onelora.combine({a: 0.5, b: 0.5}, trained=f"from:{a}")
    assert torch.equal(made.saved["1.weight"], load_file(a)["1.weight"])


def test_the_base_is_compared_with_what_training_began_from(tmp_path):
    a = tmp_path / "a.safetensors"
    start = headed(a)
    wrong = start | {"1.weight": start["1.weight"] + 0.1}
    with pytest.raises(onelora.BaseMismatchError, match=r"'1\.weight' of the mapping is not the value"):
        onelora.combine({a: 0.5}, trained="add", base=wrong)
    with pytest.raises(onelora.ConfigError, match=r"the mapping has no '1\.weight'"):
        onelora.combine({a: 0.5}, trained="add", base={"1.bias": start["1.bias"]})
    with pytest.raises(onelora.BaseMismatchError, match=r"'1\.weight' is \[3, 6, 1\], and \[3, 6\] in"):
        onelora.combine({a: 0.5}, trained="add", base=start | {"1.weight": start["1.weight"][..., None]})
    with pytest.raises(onelora.ConfigError, match=r"'1\.weight' of the mapping is no tensor but a list"):
        onelora.combine({a: 0.5}, trained="add", base={**start, "1.weight": [0.0]})  # type: ignore[dict-item]
    with pytest.raises(FileNotFoundError, match="base: there is no file"):
        onelora.combine({a: 0.5}, trained="add", base=tmp_path / "gone")
    (tmp_path / "bad.safetensors").write_bytes(b"not this")
    with pytest.raises(onelora.ConfigError, match="is damaged"):
        onelora.combine({a: 0.5}, trained="add", base=tmp_path / "bad.safetensors")
    half = onelora.combine({a: 0.5}, trained="add", base=start).saved["1.weight"]
    right = (start["1.weight"].double() + load_file(a)["1.weight"].double()) / 2
    torch.testing.assert_close(half.double(), right, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_widest_dtype_is_stored_with_one_rounding(dtype, tmp_path):
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    headed(a, 1, dtype)
    headed(b, 1, dtype)
    headed(c, 1)
    made = onelora.combine({a: 1.25, b: -0.25}, trained="add").saved["1.weight"]
    values = [load_file(path)["1.weight"].double() for path in (a, b)]
    assert made.dtype == dtype
    assert torch.equal(made, (1.25 * values[0] - 0.25 * values[1]).to(dtype))
    assert onelora.combine({a: 0.5, c: 0.5}, trained="add").saved["1.weight"].dtype == torch.float32


def test_ten_tenths_are_one(tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(10)]
    for path in paths:
        headed(path)
    assert sum([0.1] * 10) != 1
    onelora.combine(dict.fromkeys(paths, 0.1), trained="add")


def test_a_vector_on_what_another_one_trained_itself_is_refused(tmp_path):
    whole, vector = tmp_path / "whole.safetensors", tmp_path / "vector.safetensors"
    start = headed(whole)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model.load_state_dict(start)
    onelora.save_adapter(onelora.adapt(model), vector)
    for trained in ("add", f"from:{whole}"):
        with pytest.raises(onelora.AdapterFileError, match=r"'1' has a vector in .*vector.*whole.* trained the weight"):
            onelora.combine({whole: 1.0, vector: 1.0}, trained=trained)
    onelora.combine({whole: 1.0, vector: 1.0}, tmp_path / "mix.safetensors", trained="drop")
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model.load_state_dict(start)
    assert set(onelora.vectors(onelora.load_adapter(model, tmp_path / "mix.safetensors"))) == {"0", "1"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids)))


def test_a_parameter_of_two_names(tmp_path):
    def tied(saved, path):
        torch.manual_seed(0)
        model = onelora.adapt(Tied(), onelora.OneLoRAConfig("layer", modules_to_save=[saved]))
        with torch.no_grad():
            model.get_parameter(f"{saved}.weight").add_(1)
        onelora.save_adapter(model, path)
        return path

    head, again, embed = (
        tied(saved, tmp_path / f"{name}.safetensors")
        for saved, name in (("head", "head"), ("head", "again"), ("embed", "embed"))
    )
    torch.manual_seed(0)
    state = {"embed.weight": Tied().embed.weight.detach(), "layer.weight": torch.ones(6, 6)}  # as checkpoints: once
    made = onelora.combine({head: 1.0, again: 2.0}, tmp_path / "mix.safetensors", trained="add", base=state)
    assert made.aliases == onelora.read_adapter(head).aliases
    torch.testing.assert_close(made.saved["head.weight"], state["embed.weight"] + 3)
    torch.manual_seed(0)
    model = onelora.load_adapter(Tied(), tmp_path / "mix.safetensors")
    torch.testing.assert_close(model.embed.weight, state["embed.weight"] + 3)
    with pytest.raises(onelora.AdapterFileError, match="are one parameter of the base, and both were trained"):
        onelora.combine({head: 0.5, embed: 0.5}, trained="add", base=state)


def test_hostile_heads_are_refused(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    headed(a)
    file = onelora.read_adapter(a)
    saved = dict(file.saved)
    write_adapter(dataclasses.replace(file, saved=saved | {"1.weight": saved["1.weight"][:1]}), b)
    with pytest.raises(onelora.AdapterFileError, match=r"'1\.weight' has different shapes in the adapters"):
        onelora.combine({a: 0.5, b: 0.5}, trained="add")
    for change in ({"1.ids": torch.arange(3)}, {"1.ids": torch.ones(3, dtype=torch.bool)}):
        write_adapter(dataclasses.replace(file, saved=saved | {"1.ids": torch.zeros(3, dtype=torch.long)}), a)
        write_adapter(dataclasses.replace(file, saved=saved | change), b)
        with pytest.raises(onelora.AdapterFileError, match=r"'1\.ids' .* differs between the adapters"):
            onelora.combine({a: 0.5, b: 0.5}, trained="add")
    big = {name: torch.full_like(value, 3e38) for name, value in saved.items()}
    for path, values in ((a, big), (b, saved)):
        write_adapter(dataclasses.replace(file, saved=values), path)
    with pytest.raises(onelora.AdapterFileError, match=r"infinity in 1\.(weight|bias).*the sum does not fit its dtype"):
        onelora.combine({a: 2.0, b: -1.0}, trained="add")


def test_heads_of_which_nobody_knows_the_beginning_do_not_add(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    start = headed(a)
    write_adapter(dataclasses.replace(onelora.read_adapter(a), bases={}), b)
    for given, base in (({a: 0.5, b: 0.5}, None), ({b: 0.5}, start)):
        with pytest.raises(onelora.AdapterFileError, match=r"b\.safetensors does not tell from which values '1\."):
            onelora.combine(given, trained="add", base=base)
    assert torch.equal(onelora.combine({b: 1.0}, trained="add").saved["1.weight"], load_file(a)["1.weight"])
    onelora.combine({a: 0.5, b: 0.5}, trained=f"from:{b}")
