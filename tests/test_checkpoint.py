"""Adapter files: what they hold, round trips, and how they are written."""

import copy
import json
import os

import adapter_files
import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, perturb_norms


@pytest.fixture
def saved(tmp_path):
    return adapter_files.saved(tmp_path)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_round_trip_into_a_fresh_base(name, tmp_path):
    base, inputs = zoo.MODELS[name]()
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = onelora.load_adapter(base, tmp_path / "a.safetensors")
    assert loaded is base
    assert torch.equal(zoo.logits(loaded(**inputs)), zoo.logits(model(**inputs)))
    assert not any(p.requires_grad for n, p in base.named_parameters() if "onelora" not in n)


@pytest.mark.parametrize("order", ["adapt first", "wrap first"])
def test_names_are_those_of_the_model_without_checkpoint_wrappers(order, tmp_path):
    def wrap(model):
        return apply_activation_checkpointing(model, check_fn=lambda one: isinstance(one, (nn.Linear, nn.LayerNorm)))

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    config = onelora.OneLoRAConfig(target_modules=["0", "2"], train_norms=True)
    model, expected = copy.deepcopy(base), fill_vectors(onelora.adapt(copy.deepcopy(base), config), 0.5)
    steps = [lambda: onelora.adapt(model, config), lambda: wrap(model)]
    for step in steps if order == "adapt first" else reversed(steps):
        step()
    x = torch.randn(5, 4)
    assert list(onelora.vectors(fill_vectors(model, 0.5))) == list(onelora.vectors(expected)) == ["0", "2"]
    assert torch.equal(torch.compile(model, backend="onelora", options={"inner": "eager"})(x), expected(x))
    perturb_norms(model)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(onelora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")(x), model(x))
    onelora.add_adapter(model, "b")
    assert torch.equal(onelora.set_adapter(model, "b")(x), base(x))
    model.load_state_dict(base.state_dict())
    assert torch.equal(onelora.detach(model)(x), base(x))


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
