"""Outputs that PyTorch's exporters lose, or that have no numbers to compare: right, or one error that names them."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnx_graphs import assert_arrays
from torch import nn
from torch.autograd import forward_ad

import onelora_compile as onelora
from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.exporters import OnnxRunner, export_onnx, export_program
from onelora_compile.testing import fill_vectors, merged_copy


def tangent(s, x):
    with forward_ad.dual_level():
        both = forward_ad.unpack_dual(s.l(forward_ad.make_dual(x, torch.ones_like(x))))
    return {"y": both.primal, "slope": both.tangent}


# name -> (forward, what is said of the output where it is not written)
OUTPUTS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "tangent": (tangent, r"slope.*made None of a tensor"),
    "jvp": (lambda s, x: {"y": s.l(x), "slope": torch.func.jvp(torch.sin, (x,), (x,))[1]}, None),
    "vjp": (lambda s, x: {"y": s.l(x), "slope": torch.func.vjp(torch.sin, x)[0]}, r"slope|can't convert"),
    "sparse": (lambda s, x: {"y": s.l(x), "slope": x.to_sparse()}, r"slope.*sparse|can't convert"),
    "meta": (lambda s, x: {"y": s.l(x), "slope": torch.empty(2, device="meta")}, r"slope.*'meta'"),
    "none": (lambda s, x: {"y": s.l(x), "slope": None}, None),
    "number": (lambda s, x: {"y": s.l(x), "slope": 3}, None),
    "gradient": (lambda s, x: {"y": s.l(x), "slope": x.grad}, None),
    "while exporting": (
        lambda s, x: {"y": s.l(x), "slope": None if torch.compiler.is_exporting() else x},
        "has 1 outputs .*, the model 2",
    ),
}


class Outputs(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.l, self.given = nn.Linear(4, 4), forward

    def forward(self, x):
        return self.given(self, x)


@pytest.mark.filterwarnings("ignore:A model attribute .* requires gradient:UserWarning")  # of vjp
@pytest.mark.parametrize("to", ["onnx", "program"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_right_or_named(name, to, tmp_path):
    torch.manual_seed(0)
    forward, said = OUTPUTS[name]
    said = None if (name, to) == ("tangent", "program") else said  # torch.onnx alone loses it
    if torch.__version__ < "2.13" and name in ("tangent", "jvp", "vjp"):  # torch.export can't before
        said = r"can't (capture|convert|be run)"
    model, x = fill_vectors(onelora.adapt(Outputs(forward)), 0.1), torch.randn(2, 4)
    before = copy.deepcopy(model.state_dict())
    with contextlib.nullcontext() if said is None else pytest.raises(ExportError, match=said) as refused:
        if to == "onnx":
            export_onnx(model, (x,), tmp_path / "m.onnx", progress=False)
        else:
            given, wanted = export_program(model, (x,)).module()(x), model(x)
            tensors = {key: value for key, value in wanted.items() if isinstance(value, torch.Tensor)}
            torch.testing.assert_close(given, tensors)
    assert (tmp_path / "m.onnx").exists() == (to == "onnx" and refused is None)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_keywords_that_are_none(tmp_path):
    """A path in the place of `kwargs`."""
    model = onelora.adapt(Outputs(lambda s, x: s.l(x)))
    with pytest.raises(ConfigError, match=r"kwargs must be a mapping .*, got 'm\.pt2'"):
        export_program(model, (torch.randn(2, 4),), "m.pt2")  # type: ignore[arg-type]


class Sums(nn.Module):
    """Outputs that torch.onnx leaves in float32 whatever the dtype of the model."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x):
        y = self.l(x)
        return y, y.sum(), y.cumsum(-1)


@pytest.mark.parametrize("mode", ["fold", "load", "input", "bank"])
def test_float32_outputs_of_a_half_file_are_as_exact_as_its_numbers(mode, tmp_path):
    torch.manual_seed(0)
    model, x = fill_vectors(onelora.adapt(Sums()), 0.05).eval(), torch.randn(3, 8)
    file, path = tmp_path / "a.safetensors", tmp_path / "m.onnx"
    onelora.save_adapter(model, file)
    bank = [file] if mode == "bank" else []
    export_onnx(model, (x,), path, adapters=mode, bank=bank, dtype=torch.float16, progress=False)
    runner = OnnxRunner(path, file if mode == "bank" else None)
    wide = [one.detach().numpy() for one in merged_copy(model, torch.float64)(x.double())]
    with torch.no_grad():
        half = [one.numpy() for one in merged_copy(model).half()(x.half())]
    for found, exact, plain in zip(runner.run([x.half().numpy()]), wide, half, strict=True):
        assert_arrays(found, exact, plain.astype(found.dtype))
