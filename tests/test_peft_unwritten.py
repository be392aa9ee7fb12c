"""What a folder of PEFT has no place for, and files that do not say enough to become one: named, nothing is written."""

import json

import architectures
import pytest
import zoo
from safetensors.torch import load_file
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Sequential(self.a)

    def forward(self, x):
        return self.b(self.a(x))


def _attention():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def _experts():
    return architectures.ARCHITECTURES["mixtral"]()[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_attention, r"self_attn\.in_proj_weight, self_attn\.out_proj: a parameter that is read"),
        (_experts, "experts.*: weights of experts in one parameter"),
        (Shared, "a: a module that is registered in several places"),
        (lambda: nn.Linear(3, 3), "the model itself: the model itself, not a module in it"),
    ],
    ids=["attention", "experts", "shared", "root"],
)
@pytest.mark.parametrize("way", ["peft", "peft-miss"])
def test_what_peft_has_no_place_for_is_named_from_the_model_and_from_its_file(make, message, way, tmp_path):
    model = onelora.adapt(make())
    with pytest.raises(onelora.ConfigError, match=message):
        onelora.save_adapter(model, tmp_path / "a", format=way)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(onelora.ConfigError, match=message):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "a", format=way)
    assert not (tmp_path / "a").exists()


def test_a_head_whose_name_ends_another(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.pre_head, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.pre_head(self.fc(x)))

    model = onelora.adapt(Net(), onelora.OneLoRAConfig(modules_to_save=["head"]))
    with pytest.raises(onelora.ConfigError, match=r"every module whose name ends like .* so also pre_head"):
        onelora.save_adapter(model, tmp_path / "a", format="peft")


def test_a_file_of_an_older_version_says_that_it_does_not_know(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    onelora.save_adapter(onelora.adapt(zoo.MLP()), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "layers"}
    assert json.loads(metadata["fingerprints"])
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata)
    with pytest.raises(onelora.ConfigError, match=r"does not say what its vectors are on .*an older version"):
        convert_adapter(tmp_path / "b.safetensors", tmp_path / "b")
