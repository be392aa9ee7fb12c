"""Models that accelerate has dispatched: hooks on every module, weights on the CPU, on disk, on the meta device."""

import copy
import functools
from typing import Any

import pytest
import torch
import zoo
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx
from onelora_compile.testing import fill_vectors

BACKEND: dict[str, Any] = {"backend": "onelora", "options": {"inner": "aot_eager"}}
CPU = torch.device("cpu")
PARTS = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
PARTS |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
PLACES = {
    "hooks": lambda model, folder: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "disk": lambda model, folder: disk_offload(model, folder, CPU),
    "map": lambda model, folder: dispatch_model(model, PARTS, main_device="cpu", offload_dir=folder, force_hooks=True),
}
IDS = torch.arange(12).reshape(2, 6)


def double_llama():
    torch.manual_seed(0)
    return zoo.llama()[0].double()


@functools.cache
def adapted_in_memory():
    """The oracle: the same adapter on the same base, which nobody dispatched, with its gradients."""
    model = fill_vectors(onelora.adapt(double_llama()), 0.1)
    model(IDS, labels=IDS).loss.backward()
    return model


@pytest.fixture
def file(tmp_path):
    onelora.save_adapter(adapted_in_memory(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture(params=PLACES)
def dispatched(request, tmp_path):
    return PLACES[request.param](double_llama(), tmp_path / "offloaded")


def test_values_and_gradients(dispatched, file):
    want = adapted_in_memory()
    onelora.load_adapter(onelora.adapt(dispatched), file)
    for _ in range(2):  # the second call gets its weights anew
        out = dispatched(IDS, labels=IDS)
    out.loss.backward()
    torch.testing.assert_close(out.logits, want(IDS).logits)
    for name, vector in onelora.vectors(want).items():
        torch.testing.assert_close(onelora.vectors(dispatched)[name].grad, vector.grad)
    with onelora.disabled(dispatched):
        assert torch.equal(dispatched(IDS).logits, double_llama()(IDS).logits)


def test_an_optimizer_trains_it(dispatched):
    in_memory = onelora.adapt(double_llama())
    onelora.adapt(dispatched)
    for model in (in_memory, dispatched):
        optimizer = torch.optim.SGD(onelora.trainable_parameters(model), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
    for name, vector in onelora.vectors(in_memory).items():
        assert vector.any()
        torch.testing.assert_close(onelora.vectors(dispatched)[name], vector)


def test_compiled(dispatched, file):
    onelora.load_adapter(dispatched, file)
    check_compiled(torch.compile(dispatched, **BACKEND))


@pytest.mark.slow
def test_one_line(file):
    model: Any = torch.compile(PLACES["hooks"](double_llama(), None), **BACKEND)
    with pytest.warns(onelora.OneLoRAWarning, match="adapted"):
        model(IDS)
    check_compiled(onelora.load_adapter(model, file))


def check_compiled(model):
    out = model(IDS, labels=IDS)
    out.loss.backward()
    torch.testing.assert_close(out.logits, adapted_in_memory()(IDS).logits)
    vectors = onelora.vectors(model)
    assert vectors.keys() == onelora.vectors(adapted_in_memory()).keys()
    for name, vector in onelora.vectors(adapted_in_memory()).items():
        torch.testing.assert_close(vectors[name].grad, vector.grad)


def test_files_know_the_base(dispatched, file, tmp_path):
    onelora.load_adapter(dispatched, file)  # checks the fingerprints
    onelora.save_adapter(dispatched, tmp_path / "b.safetensors")
    one, other = onelora.read_adapter(file), onelora.read_adapter(tmp_path / "b.safetensors")
    assert one.fingerprints.keys() == other.fingerprints.keys()
    assert all(one.fingerprints[name].distance(other.fingerprints[name]) < 1e-6 for name in one.fingerprints)
    assert all(torch.equal(other.vectors[name], vector) for name, vector in one.vectors.items())


@pytest.mark.parametrize("place", PLACES)
def test_another_base_is_refused(place, file, tmp_path):
    base = double_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(onelora.BaseMismatchError, match="up_proj"):
        onelora.load_adapter(PLACES[place](base, tmp_path / "offloaded"), file)


def test_detach_leaves_what_accelerate_made(dispatched, file):
    fields = {name: set(vars(module)) for name, module in dispatched.named_modules()}
    hooks = {name: type(module._hf_hook) for name, module in dispatched.named_modules() if hasattr(module, "_hf_hook")}
    onelora.load_adapter(dispatched, file)
    onelora.detach(dispatched)
    assert torch.equal(dispatched(IDS).logits, double_llama()(IDS).logits)
    assert hooks == {n: type(m._hf_hook) for n, m in dispatched.named_modules() if hasattr(m, "_hf_hook")}
    assert {n: set(vars(m)) - {"_onelora_state"} for n, m in dispatched.named_modules()} == fields


@pytest.mark.slow
def test_removing_the_hooks_brings_the_weights_back(dispatched, file):
    onelora.load_adapter(dispatched, file)
    remove_hook_from_submodules(dispatched)
    assert not any(parameter.is_meta for parameter in dispatched.parameters())
    torch.testing.assert_close(dispatched(IDS).logits, adapted_in_memory()(IDS).logits)
    onelora.merge(dispatched)
    torch.testing.assert_close(dispatched(IDS).logits, adapted_in_memory()(IDS).logits)


@pytest.mark.slow
def test_merge_of_hooked_modules(file):
    model = onelora.load_adapter(PLACES["hooks"](double_llama(), None), file)
    onelora.merge(model)
    assert not onelora.vectors(model)
    torch.testing.assert_close(model(IDS).logits, adapted_in_memory()(IDS).logits)


@pytest.mark.parametrize("place", ["cpu", "disk", "map"])
def test_what_would_write_to_offloaded_weights_is_refused(place, file, tmp_path):
    model = PLACES[place](double_llama(), tmp_path / "offloaded")
    config = onelora.OneLoRAConfig(target_modules=["q_proj"], modules_to_save=["layers.1.input_layernorm"])
    with pytest.raises(onelora.TargetError, match=r"'model.layers.1.*norm.weight' is to be trained.* has offloaded it"):
        onelora.adapt(model, config)
    assert not onelora.vectors(model)
    onelora.load_adapter(model, file)
    with pytest.raises(onelora.MergeError, match="load the base without offloading"):
        onelora.merge(model)
    torch.testing.assert_close(model(IDS).logits, adapted_in_memory()(IDS).logits)
    with pytest.raises(onelora.ExportError, match="load the base without offloading"):
        export_onnx(model, (IDS,), tmp_path / "m.onnx")


@pytest.mark.slow
def test_export_of_hooked_modules(file, tmp_path):
    model = onelora.load_adapter(PLACES["hooks"](double_llama().float(), None), file)
    export_onnx(model, (IDS,), tmp_path / "m.onnx", kwargs={"use_cache": False})


@pytest.mark.slow
def test_copies(dispatched, file):
    onelora.load_adapter(dispatched, file)
    twin = copy.deepcopy(dispatched)
    for vector in onelora.vectors(dispatched).values():
        vector.data.zero_()
    torch.testing.assert_close(twin(IDS).logits, adapted_in_memory()(IDS).logits)


@pytest.mark.slow
def test_adapted_first_and_hooked_afterwards(file):
    model = PLACES["hooks"](onelora.load_adapter(double_llama(), file), None)
    torch.testing.assert_close(model(IDS).logits, adapted_in_memory()(IDS).logits)
    onelora.detach(model)
    assert torch.equal(model(IDS).logits, double_llama()(IDS).logits)


@pytest.mark.parametrize("place", ["cpu", "disk", "map"])
def test_adapted_first_and_offloaded_afterwards(place, file, tmp_path):
    model = PLACES[place](onelora.load_adapter(double_llama(), file), tmp_path / "offloaded")
    torch.testing.assert_close(model(IDS).logits, adapted_in_memory()(IDS).logits)
    for use in (onelora.trainable_parameters, lambda m: onelora.load_adapter(m, file), onelora.detach):
        with pytest.raises(onelora.StateError, match="dispatch it first"):
            use(model)


class Reads(nn.Module):
    """A weight that is read, beside a linear that is called."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(nn.functional.linear(x, self.w).relu())


@pytest.mark.parametrize("place", ["hooks", "cpu", "disk"])
def test_weights_that_are_read(place, tmp_path):
    torch.manual_seed(0)
    base, x = Reads(), torch.randn(7, 4)
    model = PLACES[place](copy.deepcopy(base), tmp_path / "offloaded")
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["w", "out"]
    fill_vectors(model, 0.5)
    w, out = (vector.detach().double()[:, None] for vector in onelora.vectors(model).values())
    exact = (x.double() @ (base.w.double() + w).T).relu()
    exact = exact @ (base.out.weight.double() + out).T + base.out.bias.double()
    torch.testing.assert_close(model(x).double(), exact, rtol=1e-5, atol=1e-5)
    onelora.detach(model)
    assert torch.equal(model(x), base(x))


def test_weights_that_come_with_a_module_around_are_refused():
    model = cpu_offload(nn.Sequential(Reads()), CPU, preload_module_classes=["Reads"])
    with pytest.raises(onelora.TargetError, match=r"'0.out' gets its weights from the accelerate hook"):
        onelora.adapt(model)
    assert not onelora.vectors(model)


def test_a_forward_that_somebody_else_put_there_is_refused():
    for hooked in (False, True):
        model = nn.Sequential(nn.Linear(4, 4))
        vars(model[0])["forward"] = lambda x: x
        if hooked:
            model = PLACES["hooks"](model, None)
        with pytest.raises(onelora.TargetError, match="a forward of its own on the instance"):
            onelora.adapt(model)
        assert model(torch.ones(2, 4)).sum() == 8


def test_a_function_that_names_itself():
    def again(depth):
        return again(depth - 1) if depth else 0

    model = nn.Sequential(nn.Linear(4, 4))
    vars(model)["helper"] = again
    assert list(onelora.vectors(onelora.adapt(model))) == ["0"]
