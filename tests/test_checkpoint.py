"""Adapter files: round trips, the base they belong to, and everything that can be wrong with them."""

import copy
import json
import os

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


@pytest.fixture
def saved(tmp_path):
    """A base, an adapted and trained copy of it, and its file."""
    base, inputs = zoo.tiny_vit()
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    path = tmp_path / "a.safetensors"
    onelora.save_adapter(model, path)
    return base, model, path, inputs


def rewrite(path, change=lambda tensors: tensors, **metadata):
    """The same file with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    header = {key: value for key, value in (header | metadata).items() if value is not None}
    save_file(change(load_file(path)), path, header)


def unchanged(model, before):
    return all(torch.equal(vector, before[name]) for name, vector in onelora.vectors(model).items())


def values(model):
    return {name: vector.detach().clone() for name, vector in onelora.vectors(model).items()}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_round_trip_into_a_fresh_base(name, tmp_path):
    base, inputs = zoo.MODELS[name]()
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = onelora.load_adapter(base, tmp_path / "a.safetensors")
    assert loaded is base
    assert torch.equal(zoo.logits(loaded(**inputs)), zoo.logits(model(**inputs)))
    assert not any(p.requires_grad for n, p in base.named_parameters() if "onelora" not in n)


def test_the_file_holds_float32_vectors_by_module_name_and_says_what_it_is(saved):
    _, model, path, _ = saved
    tensors = load_file(path)
    assert set(tensors) == set(onelora.vectors(model))
    assert all(tensors[name].dtype == torch.float32 for name in tensors)
    assert tensors["blocks.0.fc1"].shape == (192,)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "onelora"
    assert metadata["format_version"] == "1"
    assert onelora.OneLoRAConfig.from_json(metadata["config"]) == onelora.OneLoRAConfig()
    assert set(json.loads(metadata["fingerprints"])) == set(tensors)


def test_small(saved):
    _, model, path, _ = saved
    vectors = 4 * sum(v.numel() for v in onelora.vectors(model).values())
    assert path.stat().st_size < vectors + 400 * len(onelora.vectors(model)) + 600


def test_modules_to_save_norms_and_batch_norm_travel(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn, self.ln, self.head = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.ln(self.bn(self.a(x))))

    base = Net()
    config = onelora.OneLoRAConfig(modules_to_save=["head"], train_norms=True)
    model = onelora.adapt(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD(onelora.trainable_parameters(model), lr=0.1)
    x = torch.randn(32, 8)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    onelora.save_adapter(model, tmp_path / "a")
    file = onelora.read_adapter(tmp_path / "a")
    norms = {
        "ln.weight",
        "ln.bias",
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    }
    assert set(file.saved) == norms | {"head.weight", "head.bias"}
    for target in (copy.deepcopy(base), onelora.adapt(copy.deepcopy(base), config)):
        loaded = onelora.load_adapter(target, tmp_path / "a").eval()
        assert torch.equal(loaded(x), model.eval()(x))
        back = onelora.detach(loaded).state_dict()
        assert all(torch.equal(back[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_base_in_another_dtype_is_the_same_base(saved, dtype):
    base, model, path, _ = saved
    loaded = onelora.load_adapter(copy.deepcopy(base).to(dtype), path)
    for name, vector in onelora.vectors(loaded).items():
        torch.testing.assert_close(vector.float(), onelora.vectors(model)[name], rtol=1e-6, atol=0)
    low = fill_vectors(onelora.adapt(copy.deepcopy(base).to(dtype)))
    onelora.save_adapter(low, path)
    onelora.load_adapter(base, path)


@pytest.mark.parametrize("damage", ["other seed", "one row", "five percent of one layer", "merged"])
def test_another_base_is_refused_and_left_alone(saved, damage):
    base, model, path, inputs = saved
    with torch.no_grad():
        if damage == "other seed":
            for parameter in base.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        elif damage == "one row":
            base.blocks[1].fc1.weight[17] *= 1.5
        elif damage == "five percent of one layer":
            base.blocks[1].fc2.weight.mul_(1.05)
        else:
            twin = copy.deepcopy(model)
            onelora.merge(twin)
            base = twin
    expected = base(**inputs)
    kind = type(base.embed)
    with pytest.raises(onelora.BaseMismatchError, match=r"another base.*(blocks\.1|embed)"):
        onelora.load_adapter(base, path)
    assert type(base.embed) is kind
    assert onelora.vectors(base) == {}
    assert torch.equal(base(**inputs), expected)
    assert all(p.requires_grad for p in base.parameters())


def test_a_model_without_the_layers_names_them(saved):
    _, _, path, _ = saved
    other = zoo.TinyViT(depth=1)
    with pytest.raises(onelora.AdapterFileError, match=r"does not have: blocks\.1\.fc1"):
        onelora.load_adapter(other, path)
    assert onelora.vectors(other) == {}


def test_another_width_is_an_error_with_both_shapes(saved):
    _, _, path, _ = saved
    with pytest.raises(onelora.AdapterFileError, match=r"\[48, 12\].*\[24, 12\]"):
        onelora.load_adapter(zoo.TinyViT(width=24), path)


def test_missing_and_extra_vectors_are_named(saved):
    base, _, path, _ = saved
    fewer = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(exclude_modules=["embed"]))
    with pytest.raises(onelora.AdapterFileError, match=r"Missing in the model: embed"):
        onelora.load_adapter(fewer, path)
    onelora.save_adapter(fill_vectors(fewer), path)
    full = fill_vectors(onelora.adapt(copy.deepcopy(base)), seed=5)
    before = values(full)
    with pytest.raises(onelora.AdapterFileError, match=r"Missing in the file: embed"):
        onelora.load_adapter(full, path)
    assert unchanged(full, before)


def test_a_vector_dropped_from_the_file(saved):
    base, _, path, _ = saved
    rewrite(path, lambda tensors: {name: t for name, t in tensors.items() if name != "embed"})
    with pytest.raises(onelora.AdapterFileError, match="does not hold: embed"):
        onelora.load_adapter(base, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_both_ways(saved, value, tmp_path):
    base, model, path, _ = saved
    content = path.read_bytes()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        onelora.vectors(twin)["embed"][3] = value
    with pytest.raises(onelora.AdapterFileError, match="NaN or infinity in embed"):
        onelora.save_adapter(twin, path)
    assert path.read_bytes() == content

    def poison(tensors):
        tensors["embed"][3] = value
        return tensors

    rewrite(path, poison)
    before = values(model)
    with pytest.raises(onelora.AdapterFileError, match="NaN or infinity in embed"):
        onelora.load_adapter(model, path)
    assert unchanged(model, before)
    with pytest.raises(onelora.AdapterFileError):
        onelora.load_adapter(base, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "2"}, "format version '2'.*upgrade"),
        ({"format_version": "one"}, "format version 'one'"),
        ({"format": "pt"}, "not an adapter of onelora"),
        ({"format": None}, "not an adapter of onelora"),
        ({"config": "{"}, "damaged metadata"),
        ({"config": '{"rank": 3}'}, "damaged metadata.*'rank'"),
        ({"config": "[" * 100_000}, "damaged metadata"),
        ({"fingerprints": "[]"}, "damaged metadata"),
        ({"fingerprints": '{"embed": {"shape": [48]}}'}, "damaged metadata"),
        ({"fingerprints": "{}"}, "holds no vector"),
    ],
)
def test_wrong_metadata(saved, change, message):
    base, _, path, _ = saved
    rewrite(path, **change)
    with pytest.raises(onelora.AdapterFileError, match=message):
        onelora.load_adapter(base, path)
    assert onelora.vectors(base) == {}


def test_a_vector_of_the_wrong_shape_or_dtype(saved):
    base, _, path, _ = saved
    original = path.read_bytes()
    for change in (lambda v: v[:-1].clone(), lambda v: v.half(), lambda v: v[None].clone()):
        shape = r"\[1, 48\] of 'embed'.*takes \[48\]"
        path.write_bytes(original)
        rewrite(path, lambda tensors, change=change: tensors | {"embed": change(tensors["embed"])})
        with pytest.raises(onelora.AdapterFileError, match=rf"vector of 'embed'.*needs torch\.float32 \[48\]|{shape}"):
            onelora.load_adapter(base, path)


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 not this", b"\xff" * 64, b"\x00" * 4096])
def test_not_a_safetensors_file(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(onelora.AdapterFileError, match="safetensors"):
        onelora.load_adapter(zoo.MLP(), path)


def test_no_such_file_and_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter file .*nothing\.safetensors"):
        onelora.load_adapter(zoo.MLP(), tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"folder .*missing does not exist"):
        onelora.save_adapter(onelora.adapt(zoo.MLP()), tmp_path / "missing" / "a.safetensors")
    with pytest.raises(IsADirectoryError):
        onelora.save_adapter(onelora.adapt(zoo.MLP()), tmp_path)


@given(st.data())
def test_any_damage_is_a_clear_error_and_loads_nothing(data):
    import tempfile
    from pathlib import Path

    torch.manual_seed(0)
    model = fill_vectors(onelora.adapt(zoo.MLP()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        onelora.save_adapter(model, path)
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans(), "truncate"):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            for _ in range(data.draw(st.integers(1, 8))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        before = values(model)
        try:
            onelora.load_adapter(model, path)
        except onelora.AdapterFileError:
            assert unchanged(model, before)
        # Otherwise only the numbers of a vector changed, to other finite ones.


def test_saving_replaces_in_one_step_and_keeps_permissions_and_links(saved, monkeypatch):
    _, model, path, _ = saved
    content = path.read_bytes()
    os.chmod(path, 0o640)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("onelora_compile.weights.adapter_file.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            onelora.save_adapter(model, path)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]

    link = path.with_name("link.safetensors")
    link.symlink_to(path.name)
    fill_vectors(model, seed=3)
    onelora.save_adapter(model, link)
    assert link.is_symlink()
    assert path.read_bytes() != content
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_new_file_can_be_read_by_whom_the_umask_allows(saved):
    _, _, path, _ = saved
    plain = path.with_name("plain")
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


def test_killed_while_saving_leaves_the_old_file(saved, tmp_path):
    import subprocess
    import sys

    _, _, path, _ = saved
    content = path.read_bytes()
    script = (
        "import os, signal, torch, onelora_compile as o, onelora_compile.weights.adapter_file as c\n"
        "write = c.save_file\n"
        "def half(tensors, file, metadata):\n"
        "    write(tensors, file, metadata)\n"
        "    os.truncate(file, 40)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.save_file = half\n"
        f"o.save_adapter(o.adapt(torch.nn.Sequential(torch.nn.Linear(3, 3))), {str(path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert path.read_bytes() == content
    onelora.read_adapter(path)


def test_load_does_not_evaluate_the_files_patterns(saved):
    # A hostile file could name a pattern that takes for ever to match; the vectors' names alone count.
    base, _, path, _ = saved
    config = json.loads(onelora.OneLoRAConfig().to_json()) | {"target_modules": "(a+)+b" * 20}
    rewrite(path, config=json.dumps(config))
    onelora.load_adapter(base, path)


def test_config_round_trip():
    config = onelora.OneLoRAConfig(["a", "b"], "c.*", ["head"], True, torch.bfloat16)
    assert onelora.OneLoRAConfig.from_json(config.to_json()) == config


def test_an_adapter_of_a_parametrised_weight_is_saved_and_loaded(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))

    model = fill_vectors(onelora.adapt(make()), 0.5)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    again = onelora.load_adapter(make(), tmp_path / "a.safetensors")
    x = torch.randn(2, 4)
    assert torch.equal(again(x), model(x))
