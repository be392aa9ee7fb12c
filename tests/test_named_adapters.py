"""Several adapters of one model by name: switches, files, and what a failed load leaves."""

import copy
import itertools
import random
from typing import Any

import pytest
import torch
import zoo
from counted_graphs import Counter, build
from row_models import Headed
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


def adapter_files(folder, base, count):
    """Files of adapters with values of their own, and for each the merged base in float64."""
    files, merged = [folder / f"{seed}.safetensors" for seed in range(count)], []
    model = onelora.adapt(copy.deepcopy(base))
    for seed, file in enumerate(files):
        onelora.save_adapter(fill_vectors(model, 0.05, seed), file)
        merged.append(merged_copy(model, torch.float64).eval())
    return files, merged


def doubled(inputs):
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def compare(actual, wide, plain, what):
    assert_parity(zoo.logits(actual), zoo.logits(wide), zoo.logits(plain), what, floor=8)


@pytest.mark.parametrize("name", ["hf_vit", "llama"])
def test_64_adapters_are_switched_without_a_new_graph(name, tmp_path):
    base, inputs = zoo.MODELS[name]()
    files, merged = adapter_files(tmp_path, base, 64)
    model = copy.deepcopy(base)
    for number, file in enumerate(files):
        onelora.load_adapter(model, file, adapter_name=f"user {number}")
    counter, order = Counter(), random.Random(0)
    fast = build(counter, model)
    addresses = [vector.data_ptr() for vector in onelora.vectors(model).values()]
    with torch.no_grad():
        wide = [other(**doubled(inputs)) for other in merged]
        narrow = [copy.deepcopy(other).float()(**inputs) for other in merged]
        for turn in range(256):
            chosen = order.randrange(64)
            onelora.set_adapter(model, f"user {chosen}")
            compare((fast if turn % 16 == 0 else model)(**inputs), wide[chosen], narrow[chosen], f"turn {turn}")
    assert len(counter.graphs) == 1
    assert addresses == [vector.data_ptr() for vector in onelora.vectors(model).values()]


def test_what_the_user_sees(tmp_path):
    base = zoo.MLP()
    files, _ = adapter_files(tmp_path, base, 2)
    model = copy.deepcopy(base)
    assert onelora.adapters(model) == {}
    onelora.load_adapter(model, files[0], adapter_name="fr")
    onelora.load_adapter(model, files[1], adapter_name="de")
    with pytest.raises(onelora.StateError, match="its submodule '0' is: pass that one"):
        onelora.adapters(nn.Sequential(model))
    compiled: Any = torch.compile(model, backend="onelora")
    found = onelora.adapters(compiled)
    assert list(found) == ["fr", "de"]
    assert [info.active for info in found.values()] == [True, False]
    assert [info.id for info in found.values()] == [0, 1]
    assert found["de"] == onelora.AdapterInfo(1, False, ("a", "b", "c"), (), 20)
    onelora.set_adapter(model, "de")
    onelora.delete_adapter(model, "fr")
    onelora.load_adapter(model, files[0], adapter_name="it")
    assert {name: info.id for name, info in onelora.adapters(model).items()} == {"de": 1, "it": 2}
    with pytest.raises(onelora.StateError, match=r"no adapter 'fr' on this model; it has .*'?de'?.*it"):
        onelora.set_adapter(model, "fr")
    with pytest.raises(onelora.StateError, match="'de': it is the active adapter; make another one active"):
        onelora.delete_adapter(model, "de")
    wrong: tuple[Any, ...] = ("", 3)
    for name in wrong:
        with pytest.raises(onelora.ConfigError, match="adapter_name"):
            onelora.load_adapter(model, files[0], adapter_name=name)
    with pytest.raises(onelora.StateError, match="an adapter 'de' already"):
        onelora.add_adapter(model, "de")


def test_adapters_of_other_layers_heads_and_norms(tmp_path):
    """Each is alone what it is beside the others, in any order, trained and loaded."""
    base = Headed().eval()
    configs = {
        "all": onelora.OneLoRAConfig(),
        "b": onelora.OneLoRAConfig(target_modules=["b"]),
        "head": onelora.OneLoRAConfig(target_modules=["a"], modules_to_save=["head"]),
        "norms": onelora.OneLoRAConfig(target_modules=["a", "b"], train_norms=True),
    }
    x = torch.randn(4, 8)
    expected: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for seed, (name, config) in enumerate(configs.items()):
        model = fill_vectors(onelora.adapt(copy.deepcopy(base), config), 0.3, seed)
        with torch.no_grad():
            for parameter in onelora.trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if name == "norms":
                model.get_buffer("batch.running_mean").add_(0.5)
        onelora.save_adapter(model, files.setdefault(name, tmp_path / f"{name}.safetensors"))
        expected[name] = merged_copy(model, torch.float64)(x.double())
    for order in list(itertools.permutations(configs))[::5]:
        model = copy.deepcopy(base)
        for name in order:
            onelora.load_adapter(model, files[name], adapter_name=name)
        for name in (*order, *reversed(order)):
            onelora.set_adapter(model, name)
            torch.testing.assert_close(model(x).double(), expected[name], rtol=1e-5, atol=1e-5)
        for name in order:
            onelora.save_adapter(model, tmp_path / "again.safetensors", adapter_name=name)
            again, before = (onelora.read_adapter(path) for path in (tmp_path / "again.safetensors", files[name]))
            assert again.config == before.config
            assert list(again.vectors) == [key for key in again.vectors if key in before.vectors]
            for key, tensor in before.tensors.items():
                assert torch.equal(again.tensors[key], tensor), key
            assert [one.to_json() for one in again.fingerprints.values()] == [
                before.fingerprints[key].to_json() for key in again.fingerprints
            ]
            assert set(again.bases) == set(before.bases)
        onelora.detach(model)
        assert all(torch.equal(value, base.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_was_trained_waits_too():
    model = onelora.adapt(zoo.MLP(), adapter_name="one")
    onelora.add_adapter(model, "two")
    x = torch.randn(5, 8)
    out = {}
    for name in ("one", "two", "one"):
        onelora.set_adapter(model, name)
        optimizer = torch.optim.SGD(onelora.trainable_parameters(model), lr=0.1)
        model(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        out[name] = model(x).detach()
    for name in ("two", "one"):
        assert torch.equal(onelora.set_adapter(model, name)(x), out[name])


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0, 2])
def test_a_scale_is_of_the_model_and_not_of_the_adapter(scale, tmp_path):
    model = fill_vectors(onelora.adapt(zoo.MLP(), adapter_name="one"), 0.5)
    onelora.add_adapter(model, "two")
    own = {name: vector.detach().clone() for name, vector in onelora.vectors(model).items()}
    onelora.set_adapter(model, "one", scale=scale)
    assert all(torch.equal(vector, own[name] * scale) for name, vector in onelora.vectors(model).items())
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert all(
        torch.equal(value, own[key]) for key, value in onelora.read_adapter(tmp_path / "a.safetensors").vectors.items()
    )
    with torch.no_grad():
        onelora.vectors(model)["a"].add_(1.0)  # a step of training
    if scale == 0:
        with pytest.raises(onelora.StateError, match="while its scale was 0"):
            onelora.set_adapter(model, "two")
        return
    onelora.set_adapter(model, "two")
    onelora.set_adapter(model, "one")
    torch.testing.assert_close(onelora.vectors(model)["a"].detach(), own["a"] + 1 / scale)
    wrong: tuple[Any, ...] = (float("nan"), "2", True, 10**400)
    for bad in wrong:
        with pytest.raises(onelora.ConfigError, match="scale="):
            onelora.set_adapter(model, "one", scale=bad)


def test_another_adapter_on_the_same_layers_compiles_nothing(tmp_path):
    base = zoo.MLP()
    files, merged = adapter_files(tmp_path, base, 3)
    model = onelora.load_adapter(copy.deepcopy(base), files[0])
    counter = Counter()
    fast, x = build(counter, model), torch.randn(4, 8)
    with torch.no_grad():
        fast(x)
        for number in (1, 2):
            onelora.load_adapter(model, files[number], adapter_name=str(number))
            assert_parity(fast(x), merged[number - 1](x.double()), copy.deepcopy(merged[number - 1]).float()(x))
            onelora.set_adapter(model, str(number))
            assert_parity(fast(x), merged[number](x.double()), copy.deepcopy(merged[number]).float()(x))
    assert len(counter.graphs) == 1


def snapshot(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, onelora.adapters(model), [type(module) for module in model.modules()]


def test_a_failed_load_leaves_everything_as_it_was(tmp_path):
    base = Headed().eval()
    files, _ = adapter_files(tmp_path, base, 2)
    other = Headed()
    other.a.weight.data.add_(1.0)
    onelora.save_adapter(fill_vectors(onelora.adapt(other)), tmp_path / "other.safetensors")
    onelora.save_adapter(fill_vectors(onelora.adapt(zoo.MLP(bias=False))), tmp_path / "strange.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(files[0].read_bytes()[:200])
    only_b = onelora.OneLoRAConfig(target_modules=["b"])
    model = onelora.adapt(copy.deepcopy(base), only_b)
    onelora.load_adapter(model, files[0], adapter_name="one")
    before = snapshot(model)
    cases = {"other": onelora.BaseMismatchError, "strange": onelora.AdapterFileError, "cut": onelora.AdapterFileError}
    for name, error in cases.items():
        for adapter in ("new", "one", "default"):
            with pytest.raises(error):
                onelora.load_adapter(model, tmp_path / f"{name}.safetensors", adapter_name=adapter)
            after = snapshot(model)
            assert all(torch.equal(after[0][key], value) for key, value in before[0].items())
            assert after[1:] == before[1:]
    onelora.set_adapter(model, "one")
    alone = onelora.load_adapter(copy.deepcopy(base), files[0])
    x = torch.randn(3, 8)
    assert torch.equal(model(x), alone(x))
