"""Inside a block of `torch.autocast`: what is saved, loaded, folded and exported is as outside of it."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import OnnxRunner, export_onnx, export_program, fold_onnx, verify
from onelora_compile.testing import fill_vectors


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.head = nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.fc(x))))


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def adapted():
    model = onelora.adapt(Model().eval(), onelora.OneLoRAConfig(modules_to_save=["head"]))
    return fill_vectors(model, 0.3)


def content(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}


@pytest.mark.parametrize("form", ["a.safetensors", "peft", "peft-miss"])
def test_an_adapter_that_is_saved_there_is_of_its_base(form, tmp_path):
    model, x = adapted(), torch.randn(3, 64)
    path = tmp_path / form
    given = {} if path.suffix else {"format": form}
    with autocast():
        onelora.save_adapter(model, path, **given)
    assert torch.equal(onelora.load_adapter(Model().eval(), path)(x), model(x))
    if path.suffix:
        onelora.save_adapter(model, tmp_path / "outside.safetensors")
        assert content(path) == content(tmp_path / "outside.safetensors")


def test_an_adapter_is_loaded_there(tmp_path):
    model, base, x = adapted(), Model().eval(), torch.randn(3, 64)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    with autocast():
        onelora.load_adapter(base, tmp_path / "a.safetensors")
        onelora.load_adapter(base, tmp_path / "a.safetensors", adapter_name="again")
    assert torch.equal(base(x), model(x))
    assert torch.equal(onelora.set_adapter(base, "again")(x), model(x))


def test_files_are_those_that_are_made_outside(tmp_path):
    model, x = adapted(), torch.randn(3, 64)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    export_onnx(Model().eval(), (x,), tmp_path / "base.onnx")

    def made(where):
        where.mkdir()
        fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", where / "folded.onnx", progress=False)
        export_onnx(model, (x,), where / "model.onnx")
        assert verify(where / "folded.onnx", model, (x,)).passed
        return export_program(model, (x,))

    with autocast():
        program = made(tmp_path / "inside")
    assert torch.equal(program.module()(x), made(tmp_path / "outside").module()(x))
    for name in ("folded.onnx", "model.onnx"):
        found, wanted = (OnnxRunner(tmp_path / place / name).run([x.numpy()]) for place in ("inside", "outside"))
        assert (found[0] == wanted[0]).all()
