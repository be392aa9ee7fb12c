"""Names of a file's inputs and outputs: those of what the model takes and returns, or those that were asked for."""

import collections
import copy
import dataclasses
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from transformers.utils.generic import ModelOutput

import onelora_compile as onelora
from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.exporters import OnnxRunner, export_onnx, verify
from onelora_compile.testing import fill_vectors

MODES = ["fold", "load", "input", "bank"]
Point = collections.namedtuple("Point", ["left", "right"])


@dataclasses.dataclass
class Record:
    logits: torch.Tensor
    extra: object = None


@dataclasses.dataclass
class Output(ModelOutput):
    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    hidden_states: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    y: torch.Tensor


FORMS = {
    "tensor": (lambda a, b: a, ["output"]),
    "tuple": (lambda a, b: (a, b), ["output_0", "output_1"]),
    "list": (lambda a, b: [a, None, b], ["output_0", "output_2"]),
    "nested": (lambda a, b: (a, (b, {"z": a + b})), ["output_0", "output_1.0", "output_1.1.z"]),
    "dict": (lambda a, b: {"z": a, "a": b, "deep": {"one": [a + b]}}, ["z", "a", "deep.one.0"]),
    "ordered": (lambda a, b: collections.OrderedDict(z=a, a=b), ["z", "a"]),
    "dataclass": (lambda a, b: Record(a, Record(b)), ["logits", "extra.logits"]),
    "namedtuple": (lambda a, b: Point(a, {"b": b}), ["left", "right.b"]),
    "output": (lambda a, b: Output(a, hidden_states=(b, a + b)), ["logits", "hidden_states.0", "hidden_states.1"]),
    "twice": (lambda a, b: {"a": a, "same": a}, ["a", "same"]),
    "constant": (lambda a, b: {"a": a, "n": torch.arange(3)}, ["a", "n"]),
    "blank": (lambda a, b: {"": a, " ": b, "z": a + b}, ["output", "output.output", "z"]),
    "number": (lambda a, b: {"a": a, "n": 3, "s": "text"}, ["a"]),
}


class Model(nn.Module):
    """Two linears and a form for what they return."""

    def __init__(self, form=lambda a, b: a):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)
        self.form = form

    def forward(self, x, y):
        return self.form(self.first(x).relu(), self.second(y))


class Taking(Model):
    """The same, of one argument that holds both."""

    def forward(self, pair):  # type: ignore[override]
        x, y = pair.values() if isinstance(pair, dict) else (pair.x, pair.y) if isinstance(pair, Pair) else pair
        return super().forward(x, y)


def adapted(model):
    return fill_vectors(onelora.adapt(model), 0.5)


def export(model, args, folder, mode="fold", **options):
    """The report, and a runner of the file with the adapter of the model."""
    files = []
    if mode == "bank":
        files = [folder / "a.safetensors"]
        onelora.save_adapter(model, files[0])
    report = export_onnx(model, args, folder / "m.onnx", adapters=mode, bank=files, progress=False, **options)
    onnx.checker.check_model(str(folder / "m.onnx"))
    runner = OnnxRunner(folder / "m.onnx")
    if mode == "bank":
        runner.use("a")
    return report, runner


def each(forms):
    """All forms in all modes; by default each form in one mode, and each mode with some form."""
    pairs = [(index, form, mode) for index, form in enumerate(forms) for mode in range(4)]
    slow = pytest.mark.slow
    return [pytest.param(form, MODES[mode], marks=() if mode == index % 4 else slow) for index, form, mode in pairs]


@pytest.mark.parametrize(("form", "mode"), each(FORMS))
def test_outputs_are_named_by_what_holds_them(form, mode, tmp_path):
    build, names = FORMS[form]
    model, x = adapted(Model(build)), (torch.randn(3, 6), torch.randn(3, 6))
    _, runner = export(model, x, tmp_path, mode, dynamic_shapes={"x": {0: "batch"}, "y": {0: "batch"}})
    assert runner.input_names == ["x", "y"]
    assert runner.output_names == names
    other = torch.randn(5, 6), torch.randn(5, 6)
    assert verify(runner, model, other).passed
    assert [one.output for one in verify(runner, model, {"y": other[1], "x": other[0]}).parities] == names
    assert verify(runner, model, (), {"y": other[1], "x": other[0]}).passed


TAKEN = {
    "tuple": (lambda x, y: (x, y), ["pair.0", "pair.1"]),
    "dict": (lambda x, y: {"z": x, "a": y}, ["pair.z", "pair.a"]),
    "namedtuple": (Point, ["pair.left", "pair.right"]),
    "dataclass": (Pair, ["pair.x", "pair.y"]),
}


@pytest.mark.parametrize(("form", "mode"), each(TAKEN))
def test_inputs_are_named_by_what_holds_them(form, mode, tmp_path):
    build, names = TAKEN[form]
    model, pair = adapted(Taking()), build(torch.randn(3, 6), torch.randn(3, 6))
    _, runner = export(model, (pair,), tmp_path, mode, dynamic_shapes={"pair": {0: "batch"}})
    assert runner.input_names == names
    assert verify(runner, model, (build(torch.randn(5, 6), torch.randn(5, 6)),)).passed


def test_more_arguments_than_names_and_keywords(tmp_path):
    class Any(Model):
        def forward(self, *values, **named):
            return super().forward(values[0] + values[1], named["third"])

    x = [torch.randn(3, 6) for _ in range(3)]
    _, runner = export(adapted(Any()), x[:2], tmp_path, kwargs={"third": x[2]})
    assert runner.input_names == ["values.0", "values.1", "third"]


class Through(nn.Module):
    """Returns its inputs, too, by their own names, by another, and again."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, mask):
        return {"x": x, "y": self.linear(x * mask), "mask": mask.view_as(mask), "other": x}


@pytest.mark.parametrize("mode", MODES)
def test_an_input_that_is_an_output_keeps_its_name(mode, tmp_path):
    model = adapted(Through())
    _, runner = export(model, (torch.randn(3, 6), torch.ones(3, 6)), tmp_path, mode)
    assert runner.input_names == ["x", "mask"]
    assert runner.output_names == ["output.x", "y", "output.mask", "other"]
    assert verify(runner, model, (torch.randn(3, 6), torch.zeros(3, 6))).passed


@pytest.mark.parametrize("mode", MODES)
def test_names_that_were_asked_for(mode, tmp_path):
    model, x = adapted(Model(lambda a, b: (a, b))), (torch.randn(3, 6), torch.randn(3, 6))
    _, runner = export(model, x, tmp_path, mode, input_names=["y", "x"], output_names=["second.bias", "first.bias"])
    assert runner.input_names == ["y", "x"]
    assert runner.output_names == ["second.bias", "first.bias"]
    assert verify(runner, model, x).passed  # in order, whatever the names
    _, runner = export(model, x, tmp_path, mode, input_names={"y": "images"}, output_names={"output_1": "scores"})
    assert (runner.input_names, runner.output_names) == (["x", "images"], ["output_0", "scores"])
    assert verify(runner, model, x).passed


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"input_names": ["a"]}, "1 names; the model has 2 inputs: x, y"),
    "too many": ({"output_names": ["a", "b", "c"]}, "3 names; the model has 2 outputs: output_0, output_1"),
    "one string": ({"input_names": "a"}, "1 names; the model has 2 inputs"),
    "twice": ({"input_names": ["a", "a"]}, "gives a to more than one input"),
    "twice after renaming": ({"output_names": {"output_1": "output_0"}}, "gives output_0 to more than one output"),
    "unknown": ({"input_names": {"z": "a"}}, "renames z; the inputs are x, y"),
    "no name": ({"output_names": ["a", ""]}, "'', which is no name"),
    "an input's": ({"output_names": ["x", "b"]}, "'x' is the name of an input already"),
    "a vector's": ({"input_names": ["first", "b"], "adapters": "input"}, "'first' is the name of a vector"),
    "a vector's, as output": (
        {"output_names": ["second", "b"], "adapters": "load"},
        "'second' is the name of a vec",
    ),
    "the ids": ({"input_names": ["adapter_ids", "b"], "adapters": "bank"}, "'adapter_ids' is the name of the ids"),
}


@pytest.mark.parametrize("name", WRONG)
def test_names_that_can_not_be(name, tmp_path):
    options, message = copy.copy(WRONG[name])
    mode = options.get("adapters", "fold")
    model, x = adapted(Model(lambda a, b: (a, b))), (torch.randn(3, 6), torch.randn(3, 6))
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        export(model, x, tmp_path, mode, **{key: value for key, value in options.items() if key != "adapters"})
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("mode", MODES)
def test_own_names_that_others_have(mode, tmp_path):
    class Named(Model):
        def forward(self, first, adapter_ids):
            return {"second": super().forward(first, adapter_ids), "first.weight": first.sum()}

    model = adapted(Named())
    _, runner = export(model, (torch.randn(3, 6), torch.randn(3, 6)), tmp_path, mode)
    swapped = mode != "fold"
    assert runner.input_names == [
        "input.first" if swapped else "first",
        "input.adapter_ids" if mode == "bank" else "adapter_ids",
    ]
    assert runner.output_names == ["output.second" if swapped else "second", "first.weight"]
    assert verify(runner, model, (torch.randn(3, 6), torch.randn(3, 6))).passed


class Holder:
    def __init__(self, value):
        self.value = value


def test_what_can_not_be_looked_into_is_refused(tmp_path):
    x = torch.randn(3, 6), torch.randn(3, 6)
    with pytest.raises(ExportError, match="holder is a Holder"):
        export(adapted(Model(lambda a, b: {"holder": Holder(a)})), x, tmp_path)
    with pytest.raises(ExportError, match=r"pair\.0 is a Holder"):
        export(adapted(Taking()), ((Holder(x[0]), x[1]),), tmp_path)
    with pytest.raises(ExportError, match="Model returns no tensor"):
        export(adapted(Model(lambda a, b: None)), x, tmp_path)
    assert not (tmp_path / "m.onnx").exists()


def test_a_model_and_the_inputs_are_as_they_were(tmp_path):
    class Noting(Model):
        def forward(self, x, y):
            self.seen = x
            x += 1  # changes its argument
            return super().forward(x, y)

    model, x = adapted(Noting()), (torch.randn(3, 6), torch.randn(3, 6))
    before, attributes = [one.clone() for one in x], set(vars(model))
    export(model, x, tmp_path)
    assert all(map(torch.equal, x, before))
    assert set(vars(model)) <= attributes | {"seen"}
