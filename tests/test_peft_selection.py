"""Which modules a folder of PEFT selects: names that end others, expressions, some layers, parts of PEFT itself."""

import copy
import json

import peft
import peft_folders
import pytest
import torch
import zoo
from peft_folders import Two, assert_same, output

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter
from onelora_compile.testing import fill_vectors


@pytest.mark.parametrize("way", ["peft", "peft-miss"])
@pytest.mark.parametrize("converted", [False, True])
def test_a_name_that_is_the_ending_of_another_selects_itself_alone(converted, way, tmp_path):
    base, x = Two(), torch.randn(3, 4)
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(exclude_modules=["inner.fc"])))
    if converted:  # without the model: nothing tells which other names there are
        onelora.save_adapter(model, tmp_path / "a.safetensors")
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "a", format=way)
    else:
        onelora.save_adapter(model, tmp_path / "a", format=way)
    theirs = peft_folders.loaded(copy.deepcopy(base), tmp_path / "a")
    assert [name for name, one in theirs.named_modules() if hasattr(one, "base_layer")] == ["base_model.model.fc"]
    torch.testing.assert_close(theirs(x), model(x))
    assert torch.equal(onelora.load_adapter(base, tmp_path / "a")(x), model(x))
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["fc"]  # SGLang reads a list alone
    theirs.save_pretrained(tmp_path / "b")  # what PEFT writes of it is one module still
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        assert torch.equal(onelora.load_adapter(onelora.detach(base), tmp_path / "b")(x), model(x))


@pytest.mark.parametrize(
    "selection",
    [{"target_modules": "fc"}, {"target_modules": ["fc"], "exclude_modules": r"inner\..*"}],
    ids=["targets", "excluded"],
)
def test_an_expression_of_peft_selects_what_there_are_tensors_for(selection, tmp_path):
    base, x = Two(), torch.randn(3, 4)
    theirs = peft_folders.written(copy.deepcopy(base), tmp_path / "a", peft.MissConfig(r=1, **selection))
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        ours = onelora.load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_named_adapter_of_peft_on_some_layers_has_a_folder_of_its_own(tmp_path):
    base, inputs = zoo.bert()
    config = peft.MissConfig(r=1, target_modules=["query"], layers_to_transform=[1], layers_pattern="layer")
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="mine").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "miss_" in name:
                parameter.fill_(0.1)
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(onelora.AdapterFileError, match=r"no adapter_config.json; .*mine is one"):
        onelora.read_adapter(tmp_path)
    with pytest.warns(onelora.OneLoRAWarning, match="could not be checked"):
        ours = onelora.load_adapter(base, tmp_path / "mine")
    assert list(onelora.vectors(ours)) == ["bert.encoder.layer.1.attention.self.query"]
    assert_same(ours, theirs, inputs)


def test_names_of_a_list_that_end_another_module_have_to_have_tensors_for_it(tmp_path):
    """PEFT warns, and takes what its initialisation gives: zeros, or with init_lora_weights=False random values."""
    base = Two()
    config = peft.LoraConfig(r=1, init_lora_weights=False, target_modules=["fc"], exclude_modules=["inner.fc"])
    theirs = peft_folders.written(copy.deepcopy(base), tmp_path / "a", config)
    peft_folders.edit_config(tmp_path / "a", exclude_modules=None)
    peft_folders.edit_tensors(
        tmp_path / "a", lambda tensors: [t.fill_(1.0) for k, t in tensors.items() if "lora_A" in k]
    )
    with pytest.warns(UserWarning, match=r"missing adapter keys.*inner\.fc"):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))
    x = torch.randn(3, 4)
    assert (again(x) - theirs(x)).abs().max() > 0.1
    with pytest.raises(onelora.AdapterFileError, match=r"no tensors for inner\.fc, which its target_modules select"):
        onelora.load_adapter(base, tmp_path / "a")


def test_all_linear_leaves_out_what_peft_has_put_on_the_model(tmp_path):
    base, inputs = zoo.llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"])
    model = peft_folders.written(base, tmp_path / "theirs", config)
    before = output(model, inputs)
    onelora.adapt(model)
    names = list(onelora.vectors(model))
    assert len(names) == 2 * 6
    assert not [one for one in names if "lora_" in one or "o_proj" in one]
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in names
    assert "a part of an adapter of PEFT" in str(onelora.summary(model))
    assert torch.equal(output(model, inputs), before)
    fill_vectors(model)
    with pytest.raises(onelora.ConfigError, match=r"q_proj\.base_layer.*a part of a module that PEFT has wrapped"):
        onelora.save_adapter(model, tmp_path / "ours", format="peft")
