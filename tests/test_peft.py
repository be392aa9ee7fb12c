"""Adapters to PEFT and back: PEFT itself computes the same from what is written, and what it writes is read exactly."""

import copy
import json
import os
from typing import Any

import architectures
import peft
import peft_folders
import pytest
import torch
import zoo
from peft_folders import BUILDERS, Two, adapted, output, wide
from safetensors.torch import load_file
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

WAYS = [(name, way) for name in BUILDERS for way in ("peft", "peft-miss") if (name, way) != ("gpt2", "peft-miss")]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_peft_computes_and_merges_the_same_and_the_way_back_is_bit_exact(name, way, tmp_path):
    base, model, inputs = adapted(name)
    onelora.save_adapter(model, tmp_path / "a", format=way)
    assert set(os.listdir(tmp_path / "a")) == {"adapter_config.json", "adapter_model.safetensors"}
    expected = output(merged_copy(model, torch.float64), wide(inputs))
    ours = output(model, inputs)

    theirs = peft_folders.loaded(copy.deepcopy(base), tmp_path / "a")
    assert_parity(output(theirs, inputs), expected, ours, floor=4)
    merged = theirs.merge_and_unload()
    again = onelora.load_adapter(copy.deepcopy(base), tmp_path / "a")  # no warning: it knows its base
    assert torch.equal(output(again, inputs), ours)
    for key, vector in onelora.vectors(model).items():
        assert torch.equal(onelora.vectors(again)[key], vector), key
    onelora.merge(again)
    theirs = merged.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    for key, here in again.state_dict().items():  # both add the vector to each column, in float32
        assert torch.equal(here, theirs[key]), key


@pytest.mark.parametrize("config", [peft.MissConfig(r=1), peft.LoraConfig(r=1, lora_alpha=3)], ids=["miss", "lora"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_peft_trained_is_taken_in(name, config, tmp_path):
    base, inputs = BUILDERS[name]()
    model = peft_folders.written(copy.deepcopy(base), tmp_path / "a", copy.deepcopy(config))
    if config.peft_type == "LORA":
        constant = {"lora_A": 0.25}  # alpha / r = 3: each vector is 0.75 lora_B, exactly in float32
        peft_folders.edit_tensors(
            tmp_path / "a", lambda tensors: [t.fill_(constant["lora_A"]) for k, t in tensors.items() if "lora_A" in k]
        )
        model = peft_folders.loaded(copy.deepcopy(base), tmp_path / "a")
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        ours = onelora.load_adapter(copy.deepcopy(base), tmp_path / "a")
    for key, vector in onelora.vectors(ours).items():
        theirs = model.get_submodule(f"base_model.model.{key}")
        exact = (
            0.75 * theirs.lora_B["default"].weight[:, 0]
            if hasattr(theirs, "lora_B")
            else theirs.miss_block["default"][0]
        )
        assert torch.equal(vector, exact), key
    expected = output(merged_copy(ours, torch.float64), wide(inputs))
    assert_parity(output(ours, inputs), expected, output(model, inputs), floor=4)


def test_bone_is_an_older_name_of_miss(tmp_path):
    """As PEFT 0.17 wrote it, which is compared with by hand: 1.2e-7 to its outputs."""
    peft_folders.written(zoo.tiny_vit()[0], tmp_path / "a", peft.MissConfig(r=1, target_modules=["fc1"]))
    expected = onelora.read_adapter(tmp_path / "a").vectors
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    bone = {name: value for name, value in fields.items() if name not in ("miss_dropout", "mini_r")}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(bone | {"peft_type": "BONE"}))

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("miss_block", "bone_block")] = tensors.pop(key)

    peft_folders.edit_tensors(tmp_path / "a", rename)
    found = onelora.read_adapter(tmp_path / "a").vectors
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_rank_patterns_alphas_and_rslora_scale_as_in_peft(tmp_path):
    base, inputs = zoo.bert()
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["query", "value", "dense"],
        exclude_modules=["pooler.dense"],
        rank_pattern={"query": 1, r"layer.0.attention.output.dense": 3},
        alpha_pattern={r"^bert.*value": 7},
    )
    peft_folders.written(copy.deepcopy(base), tmp_path / "a", config)
    peft_folders.edit_tensors(
        tmp_path / "a", lambda tensors: [t.copy_(t[:, :1].expand_as(t)) for k, t in tensors.items() if "lora_A" in k]
    )
    theirs = peft_folders.loaded(copy.deepcopy(base), tmp_path / "a")
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        ours = onelora.load_adapter(base, tmp_path / "a")
    assert len(onelora.vectors(ours)) == 10
    expected = output(merged_copy(ours, torch.float64), wide(inputs))
    assert_parity(output(theirs, inputs), expected, output(ours, inputs), floor=4)


def test_a_lora_is_refused_with_what_would_be_lost_or_projected_onto_its_best_vectors(tmp_path):
    base, _ = zoo.tiny_vit()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["fc1", "qkv"])
    model = peft_folders.written(copy.deepcopy(base), tmp_path / "a", config)
    with pytest.raises(
        onelora.AdapterFileError, match=r"LoRA of rank 4 .* vectors keep \d.*per layer.*approximate=True"
    ):
        onelora.read_adapter(tmp_path / "a")
    file = onelora.read_adapter(tmp_path / "a", approximate=True)
    assert file.projection is not None
    kept = whole = 0.0
    for name, vector in file.vectors.items():
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").double()
        ones = torch.ones(delta.shape[1], 1, dtype=torch.float64)
        best = torch.linalg.lstsq(ones, delta.T).solution  # [1, out_features]
        torch.testing.assert_close(vector.double(), best[0], rtol=1e-5, atol=1e-9)
        left = (delta - best.T @ ones.T).norm() ** 2
        share = 1 - left / delta.norm() ** 2
        assert file.projection.layers[name] == pytest.approx(share.item(), rel=1e-4)
        kept, whole = kept + (delta.norm() ** 2 - left).item(), whole + (delta.norm() ** 2).item()
    assert file.projection.total == pytest.approx(kept / whole, rel=1e-4)
    with pytest.warns(onelora.OneLoRAWarning) as said:
        onelora.load_adapter(base, tmp_path / "a", approximate=True)
    assert [one for one in said if f"{file.projection.total:.1%} of" in str(one.message)]


class Net(nn.Module):
    """Patches, a batch norm, a shared module, a head."""

    def __init__(self, affine=True):
        super().__init__()
        self.patch, self.bn = nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6, affine=affine)
        self.fc, self.last_norm, self.head = (
            nn.Linear(6, 6),
            nn.LayerNorm(6),
            nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)),
        )

    def forward(self, x):
        return self.head(self.last_norm(self.fc(self.bn(self.patch(x)).mean((2, 3)))))


@pytest.mark.parametrize("moved", [False, True], ids=["still", "moved"])
@pytest.mark.parametrize("affine", [True, False])
def test_patches_heads_norms_and_statistics_travel(affine, moved, tmp_path):
    torch.manual_seed(0)
    base, x = Net(affine).eval(), torch.randn(3, 3, 8, 8)
    config = onelora.OneLoRAConfig(target_modules=["patch", "fc"], modules_to_save=["head", "last_norm"])
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), config))
    with torch.no_grad():
        for part in (model.head, model.last_norm):
            for parameter in part.parameters():
                parameter.add_(0.1)
    if moved:
        model.train()(x + 1)
        model.eval()
    onelora.save_adapter(model, tmp_path / "a", format="peft")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == (["bn"] if moved else []) + ["head", "last_norm"]
    theirs = peft_folders.loaded(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)
    again = onelora.load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(again(x), model(x))
    onelora.load_adapter(model, tmp_path / "a")  # into one that is adapted already

    peft_folders.edit_tensors(tmp_path / "a", lambda tensors: None)  # as PEFT writes it: no metadata
    target = copy.deepcopy(base)
    if not moved:
        target = model.train()
        target(x - 1)  # the statistics of what was adapted before do not stay
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        onelora.load_adapter(target, tmp_path / "a")
    assert torch.equal(again(x), target.eval()(x))


def test_a_trained_head_makes_a_classifier_of_peft(tmp_path):
    base, model, inputs = adapted("bert", modules_to_save=["classifier"])
    with torch.no_grad():
        model.classifier.weight.add_(1)
    onelora.save_adapter(model, tmp_path / "a", format="peft")
    theirs = peft_folders.loaded(copy.deepcopy(base), tmp_path / "a")
    assert type(theirs).__name__ == "PeftModelForSequenceClassification"
    torch.testing.assert_close(output(theirs, inputs), output(model, inputs), rtol=1e-5, atol=1e-6)
    written = peft_folders.written(copy.deepcopy(base), tmp_path / "b", peft.MissConfig(r=1, task_type="SEQ_CLS"))
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        ours = onelora.load_adapter(base, tmp_path / "b")
    torch.testing.assert_close(output(ours, inputs), output(written, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [-3, -0.5, 0, 0.0])
def test_alphas_of_any_sign_are_those_of_peft(alpha, tmp_path):
    base, x = Two(), torch.randn(3, 4)
    config = peft.LoraConfig(r=1, lora_alpha=alpha, target_modules=["fc"])
    peft_folders.written(copy.deepcopy(base), tmp_path / "a", config)
    if alpha:  # zero times anything is a vector of zeros
        peft_folders.edit_tensors(tmp_path / "a", lambda t: [v.fill_(1.0) for k, v in t.items() if "lora_A" in k])
    theirs = peft_folders.loaded(copy.deepcopy(base), tmp_path / "a")
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        ours = onelora.load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_lora_that_was_not_trained_yet_is_a_vector_of_zeros(tmp_path):
    peft_folders.written(Two(), tmp_path / "a", peft.LoraConfig(r=4, target_modules=["fc"]), fill=False)
    file = onelora.read_adapter(tmp_path / "a")
    assert not any(vector.any() for vector in file.vectors.values())
    assert file.projection is None


@pytest.mark.parametrize("way", ["peft", "peft-miss"])
def test_transformers_loads_it(way, tmp_path):
    base, model, inputs = adapted("llama")
    onelora.save_adapter(model, tmp_path / "a", format=way)
    base.load_adapter(str(tmp_path / "a"))
    torch.testing.assert_close(output(base, inputs), output(model, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sd3", "unet"])
def test_diffusers_loads_it(name, tmp_path):
    base, inputs = architectures.ARCHITECTURES[name]()
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    config = onelora.OneLoRAConfig(target_modules=attention)
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), config))
    onelora.save_adapter(model, tmp_path / "a", format="peft")
    bare = copy.deepcopy(base)
    base.load_lora_adapter(str(tmp_path / "a"), weight_name="adapter_model.safetensors", prefix="base_model.model")
    assert (output(bare, inputs) - output(base, inputs)).abs().max() > 1e-3
    torch.testing.assert_close(output(base, inputs), output(model, inputs), rtol=1e-5, atol=1e-5)
    if name == "sd3":
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        parts = ("vae", *(f"{one}{n}" for one in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe: Any = StableDiffusion3Pipeline(transformer=bare, scheduler=scheduler, **dict.fromkeys(parts))
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        pipe.load_lora_weights({k.replace("base_model.model.", "transformer."): t for k, t in tensors.items()})
        torch.testing.assert_close(output(bare, inputs), output(model, inputs), rtol=1e-5, atol=1e-5)
