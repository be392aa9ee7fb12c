"""Selection: PEFT's rules, and a clear word about everything that is not meant."""

import functools
import re
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.adapting.module_names import matches
from onelora_compile.adapting.select_targets import select


def selected(model, **config):
    return list(select(model, onelora.OneLoRAConfig(**config)).targets)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_same_modules_as_peft(name):
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    model, _ = zoo.MODELS[name]()
    for patterns in (["fc1", "query", "c_attn", "q_proj"], ["blocks.1.fc1", "dense", "o_proj", "c_proj"], r".*\.1\..*"):
        exclude = ["blocks.0.fc1", "0.attn.c_proj"]
        config = peft.MissConfig(r=1, target_modules=patterns, exclude_modules=exclude)
        theirs = {
            key
            for key, module in model.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            if tuners.check_target_module_exists(config, key) is True
            or isinstance(tuners.check_target_module_exists(config, key), __import__("re").Match)
        }
        ours = {
            key
            for key, module in model.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            if matches(patterns, key) and not matches(exclude, key)
        }
        assert ours == theirs


def test_all_linear_leaves_out_the_output_head_of_transformers_models():
    for name, head in {"hf_vit": "classifier", "bert": "classifier", "llama": "lm_head", "gpt2": "lm_head"}.items():
        model, _ = zoo.MODELS[name]()
        choice = select(model, onelora.OneLoRAConfig())
        assert choice.skipped == {head: "output head"}
        assert len(choice.targets) == zoo.SITES[name]
        wrapped = select(nn.ModuleDict({"inner": model, "own": nn.Linear(2, 2)}), onelora.OneLoRAConfig())
        assert wrapped.skipped == {f"inner.{head}": "output head"}
        assert "own" in wrapped.targets


def test_a_head_that_is_a_module_of_linears():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    skipped = select(RobertaForSequenceClassification(config), onelora.OneLoRAConfig()).skipped
    assert set(skipped) == {"classifier.dense", "classifier.out_proj"}


def test_the_head_can_be_asked_for():
    model, _ = zoo.bert()
    assert "classifier" in selected(model, target_modules=["query", "classifier"])


def test_plain_models_have_no_known_head():
    assert "head" in selected(zoo.TinyViT())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["qkv"]}, ["blocks.0.qkv", "blocks.1.qkv"]),
        ({"target_modules": ["0.qkv", "head"]}, ["blocks.0.qkv", "head"]),
        ({"target_modules": r"blocks\.\d\.fc\d"}, ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]),
        ({"target_modules": "head"}, ["head"]),
        ({"target_modules": ["qkv"], "exclude_modules": ["blocks.0.qkv"]}, ["blocks.1.qkv"]),
        ({"exclude_modules": r"blocks\..*"}, ["embed", "head"]),
        ({"exclude_modules": r"blocks\..*", "modules_to_save": ["head"]}, ["embed"]),
    ],
)
def test_rules(config, expected):
    assert selected(zoo.TinyViT(), **config) == expected


def test_a_suffix_must_start_at_a_dot():
    with pytest.raises(onelora.TargetError, match="'kv' matches no module"):
        selected(zoo.TinyViT(), target_modules=["kv"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "nothing"}, r"select no linear of TinyViT.*qkv \(x2\)"),
        ({"target_modules": ["qkv", "quary"]}, r"target_modules: 'quary' matches no module.*qkv \(x2\)"),
        ({"target_modules": ["norm1"]}, r"only 'blocks\.0\.norm1' \(LayerNorm\), .*not a linear"),
        ({"exclude_modules": ["fc3"]}, "exclude_modules: 'fc3' matches no module"),
        ({"target_modules": ["head"], "exclude_modules": ["head"]}, "excluded by exclude_modules: head"),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, "trained as a whole by modules_to_save"),
        ({"modules_to_save": ["hed"]}, "modules_to_save: 'hed' matches no module"),
    ],
)
def test_what_matches_nothing_is_named(config, message):
    model = zoo.TinyViT()
    with pytest.raises(onelora.TargetError, match=message):
        onelora.adapt(model, onelora.OneLoRAConfig(**config))
    assert onelora.vectors(model) == {}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "(["}, "not a regular expression"),
        ({"target_modules": ""}, "empty string"),
        ({"target_modules": [3]}, "list of names"),
        ({"target_modules": None}, "list of names"),
        ({"modules_to_save": "head"}, r"pass a list: \['head'\]"),
        ({"train_norms": 1}, "True or False"),
        ({"vector_dtype": torch.int8}, "floating-point"),
        ({"vector_dtype": "float32"}, "floating-point"),
    ],
)
def test_config_values_are_checked(config, message):
    with pytest.raises(onelora.ConfigError, match=message):
        onelora.OneLoRAConfig(**config)


def test_no_linear_at_all_and_no_norm():
    with pytest.raises(onelora.TargetError, match="Conv1d holds no linear module"):
        onelora.adapt(nn.Conv1d(1, 1, 1))
    with pytest.raises(onelora.TargetError, match="no normalisation layer"):
        onelora.adapt(zoo.MLP(), onelora.OneLoRAConfig(train_norms=True))


def test_lazy_linear_and_a_forward_on_the_instance_are_refused():
    with pytest.raises(onelora.TargetError, match="run the model once"):
        onelora.adapt(nn.Sequential(nn.LazyLinear(3)))
    model = nn.Sequential(nn.Linear(3, 3))
    vars(model[0])["forward"] = functools.partial(model[0].forward)
    with pytest.raises(onelora.TargetError, match="forward of its own on the instance"):
        onelora.adapt(model)


def test_the_forward_of_the_class_on_the_instance():
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.ones(2, 3)
    base = model(x)
    vars(model[0])["forward"] = model[0].forward  # what removing a hook of accelerate leaves
    onelora.vectors(onelora.adapt(model))["0"].data.fill_(2.0)
    torch.testing.assert_close(model(x), base + 6.0)
    assert torch.equal(onelora.detach(model)(x), base)


def test_train_norms_finds_norms_of_any_library():
    model, _ = zoo.llama()
    onelora.adapt(model, onelora.OneLoRAConfig(train_norms=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "onelora" not in name}
    assert trained == {name for name, _ in model.named_parameters() if "norm" in name and "onelora" not in name}
    assert len(trained) == 5


def test_a_linear_itself_can_be_the_model():
    model = onelora.adapt(nn.Linear(4, 3))
    assert list(onelora.vectors(model)) == [""]
    x = torch.randn(2, 4)
    assert torch.equal(onelora.detach(model)(x), model(x))


NO_CONFIG: dict[str, tuple[Any, str]] = {
    "a_string": ("all-linear", "got 'all-linear' (a str): pass onelora.OneLoRAConfig(target_modules='all-linear')"),
    "names": (["a"], "got ['a'] (a list): pass onelora.OneLoRAConfig(target_modules=['a'])"),
    "a_file": ("b.safetensors", "(a str): an adapter file goes into onelora.load_adapter(model, path)"),
    "a_dict": ({"target_modules": ["a"]}, "(a dict): pass onelora.OneLoRAConfig(**it), with keys of target_modules, "),
    "an_empty_dict": ({}, "got {} (a dict): pass onelora.OneLoRAConfig(**it)"),
    "a_number": (8, "got 8 (a int): pass onelora.OneLoRAConfig(target_modules=...), or None"),
}


@pytest.mark.parametrize("form", NO_CONFIG)
def test_what_is_no_config_is_one_error_and_the_model_stays(form):
    given, message = NO_CONFIG[form]
    model = zoo.MLP()
    with pytest.raises(onelora.ConfigError, match=re.escape(message)):
        onelora.adapt(model, given)
    assert onelora.vectors(model) == {}
    onelora.adapt(model)
    with pytest.raises(onelora.ConfigError, match=re.escape(message)):
        onelora.add_adapter(model, "b", given)
    assert list(onelora.adapters(model)) == ["default"]
