"""A frozen copy of an adapted weight in the same file stays as it is, or the file is refused by the vector's name."""

import copy
import re
from typing import Any

import onnx_tools as tools
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors
from onelora_compile.weights.adapter_file import read_adapter
from onelora_compile.weights.adapter_metadata import parsed_base


class Body(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8, bias=bias), nn.Linear(8, 3, bias=bias)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x)))


class AtRoot(Body):
    """The student's layers are the model's own, the teacher is a module beside them."""

    def __init__(self, bias):
        super().__init__(bias)
        self.teacher = Body(bias)
        self.teacher.load_state_dict(self.state_dict(), strict=False)

    def forward(self, x):
        return super().forward(x) - 0.5 * self.teacher(torch.sin(x))


class Siblings(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.student = Body(bias)
        self.teacher = copy.deepcopy(self.student)

    def forward(self, x):
        return self.student(x) - 0.5 * self.teacher(torch.sin(x))


class Nested(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.encoder = Body(bias)
        self.teacher = nn.ModuleDict({"encoder": copy.deepcopy(self.encoder)})

    def forward(self, x):
        return self.encoder(x) - 0.5 * self.teacher["encoder"](torch.sin(x))


class Wrapped(nn.Module):
    """Another tool's name is before all."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


MADE: dict[str, Any] = {
    "equal": lambda w: w,
    "double": lambda w: 2 * w,
    "negative": lambda w: -w,
    "transposed": lambda w: w.T,
}


class Buffer(Body):
    w0: torch.Tensor

    def __init__(self, bias, made, same):
        super().__init__(bias)
        self.same = same
        self.register_buffer("w0", MADE[made](self.fc.weight.detach()).clone().contiguous())

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x) - 0.5 * F.linear(x if self.same else torch.sin(x), self.w0)))


def own(model, args, path):
    export_onnx(model, args, path)
    return path


def int8_of_dynamo(model, args, path):
    quantize_dynamic(tools.dynamo(model, args, path.with_name("source.onnx")), path)
    return path


WRITERS = {
    "own": own, "dynamo": tools.dynamo, "dynamo_plain": tools.dynamo_plain, "torchscript": tools.torchscript,
    "torchscript_plain": tools.torchscript_plain, "int8_dynamic": tools.int8_dynamic, "int8_of_dynamo": int8_of_dynamo,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "excluded": {"exclude_modules": r"teacher.*"},
    "target": {"target_modules": r"(?!teacher).*"},
}


def check(base, writer, config, tmp_path, wrap=False):
    """Fold; the error, or the file right against float64."""
    x = torch.randn(4, 8)
    WRITERS[writer](Wrapped(base).eval() if wrap else base, (x,), tmp_path / "m.onnx")
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), onelora.OneLoRAConfig(**config)), 0.3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    try:
        fold_onnx(tmp_path / "m.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    except ExportError as error:
        assert not (tmp_path / "out.onnx").exists()
        return str(error)
    found = torch.from_numpy(tools.run(tmp_path / "out.onnx", (x,))).float()
    plain, exact = model(x), model.double()(x.double())
    if not writer.startswith("int8"):
        assert_parity(found, exact, plain)
        return ""
    before = torch.from_numpy(tools.run(tmp_path / "m.onnx", (x,)))
    rounding = (before - copy.deepcopy(base).double()(x.double())).abs().max()
    assert (found - exact).abs().max() < 4 * rounding < (before - exact).abs().max()
    return ""


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", [AtRoot, Siblings, Nested])
def test_a_frozen_module_beside_the_adapted_one_is_left_as_it_is(kind, writer, config, bias, wrap, tmp_path):
    torch.manual_seed(0)
    refusal = check(kind(bias).eval(), writer, CONFIGS[config], tmp_path, wrap)
    if kind is Nested and writer in ("torchscript", "torchscript_plain", "int8_dynamic"):
        # It writes the teacher as a second call: `/encoder/fc_1/Gemm`.
        assert re.search(r"encoder\.fc: the same numbers .*fc_1/.* \(one forward of the model uses it once\)", refusal)
    elif writer == "int8_of_dynamo":  # whose ops have lost their modules
        assert re.search(r"fc: the same numbers .* no names tell", refusal)
    else:
        assert not refusal


# Without a bias, of the same input, exporters make one op of both: a file holds nothing that tells (docs/limits.md).
@pytest.mark.parametrize(("bias", "same"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("targets", ["all-linear", ["fc", "out"], ["fc"]])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("made", MADE)
def test_a_frozen_copy_in_a_buffer_is_left_as_it_is_or_refused(same, made, writer, targets, bias, tmp_path):
    torch.manual_seed(0)
    refusal = check(Buffer(bias, made, same).eval(), writer, {"target_modules": targets}, tmp_path)
    assert not refusal or "fc: the same numbers are at" in refusal


class Read(nn.Module):
    """The weight is a parameter of the model, and its copy a buffer beside it: their ops have the same path."""

    w0: torch.Tensor

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("w0", self.w.detach().clone())

    def forward(self, x):
        return torch.tanh(F.linear(x, self.w)) - F.linear(torch.sin(x), self.w0)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_frozen_copy_of_a_weight_that_is_read_is_refused(writer, tmp_path):
    torch.manual_seed(0)
    refusal = check(Read().eval(), writer, {}, tmp_path)
    assert "w: the same numbers are at" in refusal


class Loop(Body):
    """Uses its layer as often as its input is long, so that no count bounds what a file has of it."""

    def forward(self, x):
        return self.out(torch.tanh(sum(self.fc(one) for one in x.unflatten(0, (-1, 1)).unbind(0))))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_loop_that_is_unrolled_is_no_frozen_copy(writer, tmp_path):
    torch.manual_seed(0)
    assert check(Loop(True).eval(), writer, {"target_modules": "all-linear"}, tmp_path) == ""


def test_an_adapter_file_without_counts_bounds_nothing(tmp_path):
    model = fill_vectors(onelora.adapt(Loop(True)), 0.3)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").uses == {"fc": (1, -1)}
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "uses"}
    assert set(parsed_base(metadata).uses.values()) == {(1, -1)}
