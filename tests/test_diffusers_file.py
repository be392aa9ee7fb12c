"""The one file of a LoRA of diffusers, as its pipelines and models write it."""

import copy
import json
from typing import Any

import architectures
import peft
import pytest
import torch
from command_line import run
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from peft_folders import assert_same, output
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import onelora_compile as onelora

FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_out.0"]
UNKNOWN = "could not be checked"


def with_lora(name, constant=True, **changes):
    """A model that diffusers has adapted, and what it was; lora_A is constant, as that of a vector."""
    base, inputs = architectures.ARCHITECTURES[name]()
    model: Any = copy.deepcopy(base)
    config: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS} | changes
    model.add_adapter(peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.copy_(torch.randn(value.shape, generator=generator))
                if constant and "lora_A" in key:
                    value.fill_(0.5)
    return base, model.eval(), inputs


def by_pipeline(name, model, folder, configured):
    """What save_lora_weights of a pipeline writes: for the UNet by the names that its training scripts give."""
    part, pipeline = {"sd3": ("transformer", StableDiffusion3Pipeline), "unet": ("unet", StableDiffusionPipeline)}[name]
    layers = get_peft_model_state_dict(model)
    layers = convert_state_dict_to_diffusers(layers) if name == "unet" else layers
    said = {f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict()} if configured else {}
    save: Any = pipeline.save_lora_weights
    save(str(folder), **{f"{part}_lora_layers": layers}, **said)
    return folder / FILE


@pytest.mark.parametrize("way", ["configured", "bare", "model"])
@pytest.mark.parametrize("name", ["sd3", "unet"])
def test_a_file_of_diffusers_is_read(name, way, tmp_path):
    alpha = {} if way != "bare" else {"lora_alpha": 2}  # a file without a configuration means a scale of 1
    base, theirs, inputs = with_lora(name, **alpha)
    if way == "model":
        theirs.save_lora_adapter(str(tmp_path))
    else:
        by_pipeline(name, theirs, tmp_path, way == "configured")
    assert (output(theirs, inputs) - output(base, inputs)).abs().max() > 1e-3
    for place in (tmp_path / FILE, tmp_path):
        with pytest.warns(onelora.OneLoRAWarning, match=UNKNOWN):
            ours = onelora.load_adapter(copy.deepcopy(base), place)
        assert_same(ours, theirs, inputs)


def test_ranks_that_differ_have_a_scale_of_one_where_nothing_says_alpha(tmp_path):
    """As a pipeline loads it; the names of one rank end those of another."""
    base, theirs, inputs = with_lora("sd3", rank_pattern={"to_q": 3, r"0\.attn\.to_out\.0": 1})
    path = by_pipeline("sd3", theirs, tmp_path, configured=False)
    parts = ("vae", *(f"{one}{n}" for one in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
    bare: Any = copy.deepcopy(base)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe: Any = StableDiffusion3Pipeline(transformer=bare, scheduler=scheduler, **dict.fromkeys(parts))
    pipe.load_lora_weights(load_file(path))
    with pytest.warns(onelora.OneLoRAWarning, match=UNKNOWN):
        ours = onelora.load_adapter(base, path)
    assert_same(ours, bare, inputs)


def test_names_of_a_model_are_no_part_of_a_pipeline(tmp_path):
    """Its blocks are called transformer_blocks, and no configuration says that it is a model's own file."""
    base, theirs, inputs = with_lora("sd3", lora_alpha=2)
    theirs.save_lora_adapter(str(tmp_path))
    tensors = load_file(tmp_path / FILE)
    assert all(name.startswith("transformer_blocks.") for name in tensors)
    for prefix in ("", "transformer.", "transformer_2."):
        save_file({f"{prefix}{name}": value for name, value in tensors.items()}, tmp_path / "bare.safetensors")
        with pytest.warns(onelora.OneLoRAWarning, match=UNKNOWN):
            ours = onelora.load_adapter(copy.deepcopy(base), tmp_path / "bare.safetensors")
        assert_same(ours, theirs, inputs)


def test_the_file_of_a_text_encoder_is_read(tmp_path):
    """Its names, `.lora_linear_layer.down`, are older."""
    base, inputs = clip()
    theirs: Any = copy.deepcopy(base)
    theirs.add_adapter(peft.LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_A" in name:
                value.fill_(0.5)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs))
    save: Any = StableDiffusionPipeline.save_lora_weights
    save(str(tmp_path), text_encoder_lora_layers=layers)
    assert any(name.endswith(".lora_linear_layer.down.weight") for name in load_file(tmp_path / FILE))
    with pytest.warns(onelora.OneLoRAWarning, match=UNKNOWN):
        ours = onelora.load_adapter(base, tmp_path)
    assert_same(ours, theirs, inputs)


def clip():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 30, "max_position_embeddings": 8, "hidden_size": 16, "intermediate_size": 16}
    config = CLIPTextConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    return CLIPTextModel(config).eval(), {"input_ids": torch.arange(6)[None]}


def test_it_is_converted_and_shown(tmp_path):
    base, theirs, inputs = with_lora("sd3")
    path = by_pipeline("sd3", theirs, tmp_path, configured=True)
    for out, more in (("a.safetensors", []), ("folder", ["--to", "peft"])):
        assert run("convert", path, "-o", tmp_path / out, *more).exit_code == 0
        with pytest.warns(onelora.OneLoRAWarning, match=UNKNOWN):
            ours = onelora.load_adapter(copy.deepcopy(base), tmp_path / out)
        assert_same(ours, theirs, inputs)
    for place in (path, tmp_path):
        assert "safetensors: 1LoRA adapter" in " ".join(run("inspect", place).output.split())


def test_another_lora_is_refused_or_approximated(tmp_path):
    _, theirs, _ = with_lora("sd3", constant=False)
    path = by_pipeline("sd3", theirs, tmp_path, configured=True)
    with pytest.raises(onelora.AdapterFileError, match=r"LoRA of rank 2 .*approximate=True"):
        onelora.read_adapter(path)
    assert onelora.read_adapter(path, approximate=True).projection is not None


ONES = {"lora_A.weight": torch.ones(1, 3), "lora_B.weight": torch.ones(4, 1)}


def factors(*names):
    return {f"{name}.{factor}": value.clone() for name in names for factor, value in ONES.items()}


DAMAGED: dict[str, tuple[dict[str, torch.Tensor], Any, str]] = {
    "two models": (factors("unet.fc", "text_encoder.fc"), None, "for text_encoder, unet, and .* of one model"),
    "one of no name": (factors("unet.fc", "fc"), None, "diffusers for a model without a name, unet"),
    "a folder's": (factors("base_model.model.fc"), None, "tensors of an adapter of PEFT.* give the folder"),
    "an alpha": (factors("unet.fc") | {"unet.fc.alpha": torch.ones(())}, None, "holds fc.alpha, which is neither"),
    "a half": ({"unet.fc.lora_A.weight": torch.ones(1, 3)}, None, "'fc' has lora_A, and misses lora_B"),
    "no JSON": (factors("unet.fc"), "{", "damaged metadata: lora_adapter_metadata"),
    "no dict": (factors("unet.fc"), "[1]", "damaged metadata: lora_adapter_metadata is"),
    "another map": (factors("unet.fc"), {"unet.r": 1, "unet.lora_alpha": 1, "unet.use_dora": True}, "use_dora: DoRA"),
    "another rank": (factors("unet.fc"), {"unet.r": 2, "unet.lora_alpha": 1}, "of rank 1; the configuration says 2"),
    "kohya": (
        {f"lora_unet_a_to_q.lora_{name}.weight": torch.ones(1, 1) for name in ("down", "up")},
        None,
        r"LoRA of kohya's scripts \(lora_unet_a_to_q\.lora_down\.weight",
    ),
    "old": (
        {f"unet.a.processor.to_q_lora.{name}.weight": torch.ones(1, 1) for name in ("down", "up")},
        None,
        r"LoRA of an old diffusers \(unet\.a\.processor\.to_q_lora\.down\.weight",
    ),
    "NaN": ({name: value * torch.nan for name, value in factors("fc").items()}, None, "NaN or infinity"),
}


@pytest.mark.parametrize(("tensors", "said", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_refused(tensors, said, message, tmp_path):
    metadata = {"format": "pt"}
    if said is not None:
        metadata["lora_adapter_metadata"] = said if isinstance(said, str) else json.dumps(said)
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(onelora.AdapterFileError, match=message):
        onelora.read_adapter(tmp_path / "a.safetensors")


def test_of_another_model(tmp_path):
    save_file(factors("unet.fc"), tmp_path / "a.safetensors")
    with pytest.raises(onelora.AdapterFileError, match="linears that Linear does not have: fc"):
        onelora.load_adapter(torch.nn.Linear(3, 4), tmp_path / "a.safetensors")
