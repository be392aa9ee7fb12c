"""adapt, summary and explain leave every architecture as it was; classifiers take integer labels afterwards."""

import copy
import io
import re
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from snapshot import snapshot

import onelora_compile as onelora
from onelora_compile.testing import perturb_norms

CLASSIFIERS = {
    "BertForSequenceClassification": "text",
    "RobertaForSequenceClassification": "text",
    "DistilBertForSequenceClassification": "text",
    "LlamaForSequenceClassification": "text",
    "GPT2ForSequenceClassification": "text",
    "ViTForImageClassification": "image",
    "Dinov2ForImageClassification": "image",
    "SwinForImageClassification": "image",
    "ResNetForImageClassification": "image",
}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "pad_token_id": 0,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
OTHER: dict[str, dict[str, Any]] = {
    "DistilBert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


def classifier(name):
    import transformers

    kind = getattr(transformers, name)
    family = name.partition("For")[0]
    sizes = {k: v for k, v in SMALL.items() if family not in ("Swin", "ResNet") or k in ("image_size", "num_labels")}
    if family in ("DistilBert", "GPT2"):
        sizes = {k: SMALL[k] for k in ("vocab_size", "pad_token_id", "num_labels")}
    torch.manual_seed(0)
    model = perturb_norms(kind(kind.config_class(**sizes | OTHER.get(family, {}))))
    text = {"input_ids": torch.randint(1, 64, (2, 5))}
    return model, text if CLASSIFIERS[name] == "text" else {"pixel_values": torch.randn(2, 3, 32, 32)}


def look(model, config=None):
    onelora.adapt(model, config)
    onelora.summary(model)
    onelora.detach(model)
    for module in model.modules():
        del module._onelora_state


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_integer_labels_after_adapting(name):
    model, inputs = classifier(name)
    before = snapshot(model)
    # A ResNet has no other linear.
    config = onelora.OneLoRAConfig(target_modules=["classifier.1"]) if name.startswith("ResNet") else None
    look(model, config)
    assert snapshot(model) == before
    onelora.adapt(model, config)
    assert model.config.problem_type is None
    model(**inputs, labels=torch.tensor([0, 2])).loss.backward()
    assert any(vector.grad is not None for vector in onelora.vectors(model).values())


FEW = {"bert", "mixtral", "mamba", "whisper", "swin", "transformer"}


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES])
def test_every_architecture_is_as_before(name):
    model, _ = ARCHITECTURES[name]()
    before, saved = snapshot(model), can_be_saved(model)
    look(model)
    assert snapshot(model) == before
    assert can_be_saved(copy.deepcopy(onelora.adapt(model))) == saved


def can_be_saved(model):
    """Whole, by pickle: weight norm can't, nor what transformers hooks with a local function."""
    try:
        torch.save(model, io.BytesIO())
    except (RuntimeError, AttributeError) as error:
        if not re.search("Serialization of parametrized modules|Can't pickle local object", str(error)):
            raise
        return False
    return True
