"""Copies of the base's weights in a folder of PEFT, which writes them beside an adapter of a language model's head."""

import copy
import warnings

import peft
import peft_folders
import pytest
import torch
import zoo
from peft_folders import assert_same
from safetensors.torch import load_file

import onelora_compile as onelora

HEAD = "base_model.model.lm_head.base_layer"


def with_head(base, folder, config):
    """A folder that PEFT writes of an adapter that is on the head too, with constant lora_A."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves a copy of the head
        model = peft_folders.written(base, folder, config(r=1, target_modules=["q_proj", "lm_head"]))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_A" in name:
                    value.fill_(0.5)
        model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [peft.LoraConfig, peft.MissConfig])
def test_a_copy_tells_the_base(config, tied, tmp_path):
    base, inputs = zoo.llama(tied)
    theirs = with_head(copy.deepcopy(base), tmp_path, config)
    assert f"{HEAD}.weight" in load_file(tmp_path / peft_folders.TENSORS)
    assert set(onelora.read_adapter(tmp_path).fingerprints) == {"lm_head"}
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        ours = onelora.load_adapter(copy.deepcopy(base), tmp_path)
    assert_same(ours, theirs, inputs)

    peft_folders.edit_tensors(tmp_path, lambda tensors: tensors[f"{HEAD}.weight"].mul_(1.1))
    with pytest.raises(onelora.BaseMismatchError, match=r"another base: 1 of 3 weights .*lm_head"):
        onelora.load_adapter(base, tmp_path)
    assert not onelora.vectors(base)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{HEAD}.weight", torch.ones(3, 48), r"the vector of 'lm_head' is .*; its base weight of \[3, 48\] needs"),
        (f"{HEAD}.weight", torch.ones(5, dtype=torch.uint8), r"lm_head\.base_layer\.weight, which is neither"),
        ("base_model.model.other.base_layer.weight", torch.ones(4, 4), r"other\.base_layer\.weight, which is neither"),
    ],
    ids=["another size", "quantised", "of nothing adapted"],
)
def test_what_is_no_copy_is_refused(name, value, message, tmp_path):
    with_head(zoo.llama()[0], tmp_path, peft.LoraConfig)
    peft_folders.edit_tensors(tmp_path, lambda tensors: tensors.update({name: value}))
    with pytest.raises(onelora.AdapterFileError, match=message):
        onelora.read_adapter(tmp_path)
