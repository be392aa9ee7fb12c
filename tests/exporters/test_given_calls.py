"""What exports and comparisons are given as a call: one tensor alone, or a module that torch.jit made."""

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx, export_program, verify


def test_a_tensor_alone_is_the_one_input(tmp_path):
    x = torch.randn(2, 4)
    model = nn.Sequential(nn.Linear(4, 3))
    export_onnx(model, x, tmp_path / "m.onnx", progress=False)
    for given in (x, [x], (x,)):
        assert verify(tmp_path / "m.onnx", model, given).passed
    wrong = nn.Sequential(nn.Linear(4, 3))
    assert not verify(tmp_path / "m.onnx", wrong, x).passed


SCRIPTS = {"trace": lambda model, x: torch.jit.trace(model, x), "script": lambda model, x: torch.jit.script(model)}


@pytest.mark.filterwarnings("ignore:.torch.jit.(script|trace):DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.(script|trace):FutureWarning")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("way", SCRIPTS)
def test_a_module_of_torch_jit_is_refused_by_name(way, inside, tmp_path):
    x = torch.randn(2, 4)
    model = SCRIPTS[way](nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x)
    if inside:
        model = nn.Sequential(nn.Linear(4, 4), model)
    which = "its '1'" if inside else f"this {type(model).__name__}"
    said = rf"can't export: {which} is a module of torch.jit .* export the model that it was made of"
    for call in (lambda: export_onnx(model, (x,), tmp_path / "m.onnx"), lambda: export_program(model, (x,))):
        with pytest.raises(onelora.ExportError, match=said):
            call()
    assert not list(tmp_path.iterdir())
