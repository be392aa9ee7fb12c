"""Checkpoints of transformers' Trainer, really trained: the adapter in each, resuming, the best of them."""

import copy
from typing import Any

import pytest
import torch
import zoo
from loops import CONFIG, Digits, assert_equal, bert, state
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import onelora_compile as onelora
from onelora_compile.trainer import SaveAdapterCallback

pytestmark = [pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")]


def trainer(model, folder, full_weights=True, **changed):
    settings: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "seed": 0,
    } | changed
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=8, **settings)
    callbacks: list[Any] = [SaveAdapterCallback(full_weights)]
    return Trainer(model, arguments, train_dataset=Digits(), eval_dataset=Digits(16), callbacks=callbacks)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("full_weights", [True, False])
def test_resumed_is_uninterrupted(full_weights, compiled, tmp_path):
    base = bert()
    whole = onelora.adapt(copy.deepcopy(base), CONFIG)
    trainer(whole, tmp_path / "whole").train()

    resumed = onelora.adapt(copy.deepcopy(base), CONFIG)  # of a new process: zero vectors, its scheduler and optimizer
    trainer(copy.deepcopy(resumed), tmp_path, full_weights).train()
    checkpoint = tmp_path / "checkpoint-2"
    if compiled:
        resumed.compile(backend="onelora", options={"inner": "aot_eager"})
    trainer(resumed, tmp_path / "again", full_weights).train(resume_from_checkpoint=str(checkpoint))
    if compiled:
        torch.testing.assert_close(state(resumed), state(whole), rtol=1e-4, atol=1e-5)
    else:
        assert_equal(state(resumed), state(whole))

    later = tmp_path / "checkpoint-4" / "onelora.safetensors"
    assert_equal(state(onelora.load_adapter(copy.deepcopy(base), later)), state(whole))
    early = onelora.read_adapter(checkpoint / "onelora.safetensors")
    assert any(not torch.equal(v, onelora.vectors(whole)[n]) for n, v in early.vectors.items())


def test_small_checkpoints_are_small_and_no_model_by_themselves(tmp_path):
    model = onelora.adapt(bert(), CONFIG)
    trainer(model, tmp_path, False, max_steps=2).train()
    held = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert held.keys() == trained | {name for name, _ in model.named_buffers() if name in model.state_dict()}
    assert sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").glob("*model*")) < 30_000
    with pytest.raises((OSError, ValueError), match=r"config|model_type"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("full_weights", [True, False])
def test_the_best_is_loaded_at_the_end(full_weights, tmp_path):
    model = onelora.adapt(bert(), CONFIG)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    # A rate that grows worse: the first checkpoint is the best.
    run = trainer(model, tmp_path, full_weights, learning_rate=3.0, max_steps=8, **best)
    run.train()
    chosen = run.state.best_model_checkpoint
    assert chosen is not None
    assert not chosen.endswith("checkpoint-8")
    assert_equal(state(model), state(onelora.load_adapter(bert(), f"{chosen}/onelora.safetensors")))


def test_a_model_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(onelora.StateError, match="can't save the adapters of checkpoints"):
        trainer(zoo.bert()[0], tmp_path).train()
    assert not list(tmp_path.glob("checkpoint-*"))
