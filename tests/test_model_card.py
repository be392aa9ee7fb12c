"""Model cards: huggingface_hub parses them, their numbers are the model's, and the programs in them run."""

import copy
import dataclasses
import os
import re
import subprocess
import sys
from typing import Any

import peft_folders
import pytest
import torch
import zoo
from adapter_files import saved
from hub_places import cached, in_cache
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file, save_file

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def parsed(card, tmp_path):
    card.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def classifier(name="user/base"):
    base, inputs = zoo.bert()
    config = copy.deepcopy(base.config)
    config.num_labels = 3  # not the default of transformers
    base = type(base)(config).eval()
    base.config._name_or_path = name
    model = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(modules_to_save=["classifier"]))
    fill_vectors(model)
    with torch.no_grad():
        model.classifier.weight.normal_()
    return base, model, inputs


def rows(card):
    """The cells of each row of its tables."""
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("format", ["onelora", "peft"])
def test_what_a_card_says_to_run_runs(format, tmp_path):
    base, model, inputs = classifier()
    path = tmp_path / ("folder" if format == "peft" else "a.safetensors")
    onelora.save_adapter(model, path, format=format)
    base.save_pretrained(tmp_path / "base")
    cached(tmp_path / "cache", "user/base", {one.name: one.read_bytes() for one in (tmp_path / "base").iterdir()})
    in_cache(tmp_path / "cache", "user/name", path)
    save_file(inputs, tmp_path / "inputs.safetensors")

    card = onelora.model_card(path, "user/name", format=format)
    programs = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert len(programs) == (2 if format == "peft" else 1)
    asked = """
import sys, torch, safetensors.torch as files
for number, path in enumerate(sys.argv[1:]):
    own = {}
    exec(open(path).read(), own)
    with torch.no_grad():
        logits = own["model"].eval()(**files.load_file("inputs.safetensors")).logits
    files.save_file({"logits": logits}, f"{number}.safetensors")
"""
    paths = [tmp_path / f"{number}.py" for number in range(len(programs))]
    for path, program in zip(paths, programs, strict=True):
        path.write_text(program)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", asked, *paths]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(**inputs).logits
    for number, program in enumerate(programs):
        found = load_file(tmp_path / f"{number}.safetensors")["logits"]
        if "onelora" in program:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected)


def test_the_yaml_is_what_the_hub_and_peft_know(tmp_path):
    _, model, _ = classifier()
    ours = parsed(onelora.model_card(model, "user/name"), tmp_path).data.to_dict()
    assert ours == {
        "base_model": "user/base",
        "base_model_relation": "adapter",
        "library_name": "onelora-compile",
        "pipeline_tag": "text-classification",
        "tags": ["1lora"],
    }
    theirs = parsed(onelora.model_card(model, "user/name", format="peft"), tmp_path).data.to_dict()
    assert theirs == ours | {"library_name": "peft", "tags": ["1lora", "lora"]}


def test_its_numbers_are_the_models(tmp_path):
    base, model, _ = classifier()
    card = parsed(onelora.model_card(model, "user/name"), tmp_path)
    vectors = onelora.vectors(model)
    numbers = sum(vector.numel() for vector in vectors.values())
    table = {key: values for key, *values in rows(card)}
    assert table["vectors"][0].startswith(f"{len(vectors)}, {numbers:,} numbers")
    assert table["trained besides"] == ["classifier.bias, classifier.weight: 147 numbers"]
    assert table["target modules"] == ["all-linear"]
    weight = base.bert.pooler.dense.weight.detach().double()
    assert table["`bert.pooler.dense`"] == [str(list(weight.shape)), "float32", format(float(weight.norm()), ".4g")]
    assert f"each of {len(vectors)} base weights" in card.text
    assert "https://arxiv.org/abs/2503.08333" in card.text
    assert onelora.__version__ in card.text


def test_a_model_and_its_file_have_one_card(tmp_path):
    _, model, _ = classifier()
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    adapters: list[Any] = [model, tmp_path / "a.safetensors", torch.compile(model)]
    cards = [onelora.model_card(one, "a") for one in adapters]
    cards.append(onelora.model_card(onelora.read_adapter(tmp_path / "a.safetensors"), "a"))
    assert len({str(card) for card in cards}) == 1


def test_metrics_by_name_and_with_their_data(tmp_path):
    _, model, _ = classifier()
    values = {"accuracy": torch.tensor(0.5), "f1|x": 0.25}
    card = parsed(onelora.model_card(model, "user/name", metrics=values), tmp_path)
    assert card.data.metrics == ["accuracy", "f1|x"]
    assert rows(card)[-2:] == [["accuracy", "0.5"], ["f1\\|x", "0.25"]]
    result = EvalResult("text-classification", "glue", "GLUE", "accuracy", 0.93)
    card = parsed(onelora.model_card(model, "user/name", metrics=[result]), tmp_path)
    assert card.data.eval_results == [result]
    assert card.data.model_name == "name"
    assert rows(card)[-1] == ["accuracy on GLUE", "0.93"]
    wrongs: list[Any] = ["accuracy", [0.93], {"accuracy"}]
    for wrong in wrongs:
        with pytest.raises(onelora.ConfigError, match="EvalResult"):
            onelora.model_card(model, "user/name", metrics=wrong)
    assert "Metrics" not in onelora.model_card(model, "user/name").text


@pytest.mark.parametrize("name", ["/home/me/base", "./base", "base", ""])
def test_a_path_of_this_machine_is_not_published(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    card = parsed(onelora.model_card(classifier(name)[1], "user/name"), tmp_path)
    assert card.data.base_model is None
    assert "no id on the Hub" in card.text
    assert "/home" not in str(card)
    assert "./base" not in str(card)


def test_a_licence_and_words_are_the_users(tmp_path):
    card = onelora.model_card(classifier()[1], "user/name")
    card.data["license"] = "apache-2.0"
    card.text += "\nMore words.\n"
    again = parsed(card, tmp_path)
    assert again.data.license == "apache-2.0"
    assert again.text.endswith("More words.\n")


def test_what_knows_no_base_says_so(tmp_path):
    folder = peft_folders.ours(tmp_path / "folder")
    card = onelora.model_card(folder, "folder", format="peft")
    assert "no fingerprints" in card.text
    assert "model = ...  # the base, as it was" in card.text


def test_names_of_a_hostile_file_stay_in_their_cells(tmp_path):
    _, _, path, _ = saved(tmp_path)
    file = onelora.read_adapter(path)
    name = next(iter(file.vectors))
    evil = "a | b\n\n# Not a title"
    swap: dict[str, Any] = {
        "vectors": {evil if key == name else key: value for key, value in file.vectors.items()},
        "fingerprints": {evil if key == name else key: value for key, value in file.fingerprints.items()},
        "base_model": "evil\nlicense: mit",
    }
    card = parsed(onelora.model_card(dataclasses.replace(file, **swap), "user/name"), tmp_path)
    assert {len(row) for row in rows(card)} == {2, 4}
    assert "\n# Not a title" not in card.text
    assert card.data.license is None


def test_errors(tmp_path):
    with pytest.raises(onelora.StateError, match="was not given to adapt"):
        onelora.model_card(zoo.MLP(), "user/name")
    with pytest.raises(onelora.ConfigError, match="format='gguf'"):
        onelora.model_card(classifier()[1], "user/name", format="gguf")
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        onelora.model_card(tmp_path / "nothing.safetensors", "user/name")
