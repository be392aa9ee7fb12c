"""Folders that PEFT writes and reads, quietly: the other side of the tests of `test_peft*.py`."""

import copy
import json
import warnings
from pathlib import Path

import architectures
import peft
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BUILDERS = {**zoo.MODELS, "dit": architectures.ARCHITECTURES["dit"]}


def loaded(base, folder):
    """What `PeftModel.from_pretrained` makes of a folder; a missing or unknown tensor fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*copy_.*|.*inference_mode.*")
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def written(base, folder, config, fill=True):
    """A folder that PEFT writes of a base that it has adapted, with random values; returns its model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if fill and parameter.requires_grad:
                    scale = 0.02 if any(one in name for one in ("miss_", "lora_")) else 1.0
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(folder))
    return model


def edit_config(folder, **changes):
    path = Path(folder) / CONFIG
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | changes))


def edit_tensors(folder, change):
    """Let `change` have the dictionary of tensors, and write it back without metadata, as PEFT does."""
    path = Path(folder) / TENSORS
    tensors = load_file(path)
    change(tensors)
    save_file({name: one.contiguous() for name, one in tensors.items()}, path, {"format": "pt"})


def ours(folder):
    """A LoRA r=1 of this package as PEFT writes it: no metadata."""
    base, _ = zoo.tiny_vit()
    onelora.save_adapter(fill_vectors(onelora.adapt(base)), folder, format="peft")
    edit_tensors(folder, lambda tensors: None)
    return folder


class Two(nn.Module):
    """The name of one linear ends that of the other."""

    def __init__(self):
        super().__init__()
        self.fc, self.inner = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

    def forward(self, x):
        return self.inner["fc"](self.fc(x))


def output(model, inputs):
    found = model(**inputs)
    return (found if isinstance(found, torch.Tensor) else found[0]).detach()


def wide(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def assert_same(ours, theirs, inputs):
    """Our output is PEFT's or diffusers' own in float64, as near as their own in float32 is."""
    exact = output(copy.deepcopy(theirs).double(), wide(inputs))
    assert_parity(output(ours, inputs), exact, output(theirs, inputs), floor=4)


def adapted(name, **config):
    base, inputs = BUILDERS[name]()
    model = onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(**config))
    return base, fill_vectors(model), inputs
