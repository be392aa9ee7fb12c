"""Training loops that people use, on adapted models: transformers' Trainer, accelerate, a Lightning-style loop."""

import copy
from typing import Any

import pytest
import torch
import zoo
from loops import CONFIG, Digits, assert_equal, assert_same, bert, state
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors

# Notes of the libraries themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
]
BACKEND: dict[str, Any] = {"backend": "onelora", "options": {"inner": "aot_eager"}}


def trained(model, tmp_path, data=None, **settings):
    from transformers import Trainer, TrainingArguments

    arguments: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    arguments |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0}
    arguments |= {"output_dir": str(tmp_path), "logging_strategy": "no", "max_grad_norm": 0.0} | settings
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=data or Digits())
    return trainer.train().training_loss


def test_trainer_eager_and_compiled(tmp_path):
    base = bert()
    models = {how: onelora.adapt(copy.deepcopy(base), CONFIG) for how in ("eager", "compiled")}
    models["compiled"].compile(**BACKEND)  # the recipe: in place, before the Trainer gets the model
    losses = {how: trained(model, tmp_path) for how, model in models.items()}
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)
    assert_same(state(models["eager"]), state(models["compiled"]))
    for model in models.values():
        vectors = onelora.vectors(model)
        assert all(vector.any() for name, vector in vectors.items())
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert torch.equal(parameter, base.get_parameter(name)), name
    assert len(models["eager"].classifier.weight.unique()) > 1


def test_trainers_own_switch_refuses_the_backend(tmp_path):
    # Why the recipe is model.compile: transformers hands the name to accelerate, which has a fixed list.
    with pytest.raises(ValueError, match=r"(?i)onelora"):
        trained(onelora.adapt(bert(), CONFIG), tmp_path, torch_compile=True, torch_compile_backend="onelora")


class Tokens(Digits):
    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def test_gradient_accumulation_is_the_large_batch(tmp_path):
    # A causal model: it takes the Trainer's num_items_in_batch, without which the losses of the parts are summed.
    base = onelora.adapt(zoo.llama()[0])
    small, large = copy.deepcopy(base), copy.deepcopy(base)
    common = {"optim": "sgd", "learning_rate": 2.0, "max_steps": 2, "data": Tokens()}
    trained(small, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, **common)
    trained(large, tmp_path, per_device_train_batch_size=16, **common)
    assert_same(state(small), state(large))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(state(small).values(), state(base).values(), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, compiled, tmp_path):
    base = onelora.adapt(bert(), CONFIG)
    plain, checkpointed = copy.deepcopy(base), copy.deepcopy(base)
    trained(plain, tmp_path, max_steps=2)
    if reentrant:
        checkpointed.enable_input_require_grads()  # a frozen base: nothing else makes the segments' inputs need one
    if compiled:
        checkpointed.compile(**BACKEND)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    trained(checkpointed, tmp_path, max_steps=2)
    trainable = state(base).keys()
    check = assert_same if compiled else assert_equal
    check(*({n: v for n, v in state(m).items() if n in trainable} for m in (plain, checkpointed)))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_accelerate(precision, compiled, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    base = onelora.adapt(bert(), CONFIG)
    by_hand = copy.deepcopy(base)
    loader = torch.utils.data.DataLoader(Digits(16), batch_size=4)
    optimizer = torch.optim.SGD(onelora.trainable_parameters(base), lr=0.1)
    if compiled:
        base.compile(**BACKEND)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(base, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    other = torch.optim.SGD(onelora.trainable_parameters(by_hand), lr=0.1)
    for index, batch in enumerate(torch.utils.data.DataLoader(Digits(16), batch_size=4)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = by_hand(**batch).loss
        (loss / 2).backward()
        if index % 2:
            other.step()
            other.zero_grad()
    found, expected = state(accelerator.unwrap_model(model)), state(by_hand)
    if precision == "no":
        (assert_same if compiled else assert_equal)(found, expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=3e-3)
    assert all(vector.any() for vector in onelora.vectors(model).values())
    onelora.save_adapter(accelerator.unwrap_model(model), tmp_path / "a.safetensors")
    fresh = onelora.load_adapter(bert(), tmp_path / "a.safetensors")
    assert_equal(state(fresh), found)


class LightningStyle(nn.Module):
    """What Lightning asks of a module, without Lightning."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(onelora.trainable_parameters(self), lr=2e-2)


def fit(module, compiled):
    step = torch.compile(module.training_step, **BACKEND) if compiled else module.training_step
    optimizer = module.configure_optimizers()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for index in range(25):
        x = torch.randn(16, 16, 12, generator=generator)
        loss = step((x, (x.mean((1, 2)) > 0).long()), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_lightning_style_loop():
    model, _ = zoo.tiny_vit()
    module = LightningStyle(model.train())
    onelora.adapt(module)
    eager, compiled = copy.deepcopy(module), copy.deepcopy(module)
    losses = fit(eager, False)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert fit(compiled, True) == pytest.approx(losses, rel=1e-3)
    assert next(iter(onelora.vectors(eager))) == "net.embed"


def test_ema_of_the_vectors_is_an_adapter():
    # The vectors of a copy can follow those of the model: they add like numbers.
    model = fill_vectors(onelora.adapt(zoo.MLP()), 0.5)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    first = {name: v.detach().clone() for name, v in onelora.vectors(model).items()}
    fill_vectors(model, 0.5, seed=4)
    ema.update_parameters(model)
    for name, vector in onelora.vectors(ema.module).items():
        torch.testing.assert_close(vector, 0.5 * (first[name] + onelora.vectors(model)[name]))
