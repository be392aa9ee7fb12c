"""What a program takes and returns: its vectors by name, other sizes, caches, results as the model gives them."""

import copy

import paths
import pytest
import torch
from programs import MODES, as_inputs, small
from safetensors.torch import load_file
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_program
from onelora_compile.testing import fill_vectors


def test_an_adapter_file_is_what_the_inputs_are_called_by(tmp_path):
    model, x = small(train_norms=True, modules_to_save=["head"]), torch.randn(4, 6)
    program = export_program(model, (x,), adapters="input", dynamic_shapes=({0: "batch"},))
    names = ["body_0", "head_weight", "head_bias", "body_1_weight", "body_1_bias"]
    assert sorted(program.graph_signature.user_inputs) == sorted(["x", *names])
    assert list(program.graph_signature.user_inputs[:2]) == ["x", "body_0"]  # vectors before what is trained besides
    other = small(train_norms=True, modules_to_save=["head"])
    with torch.no_grad():
        for parameter in onelora.trainable_parameters(other):
            parameter.mul_(-0.5)
    onelora.save_adapter(other, tmp_path / "b.safetensors")
    file = load_file(tmp_path / "b.safetensors")
    given = {name.replace(".", "_"): file[name] for name in sorted(file, reverse=True)}  # the order is not theirs
    rows = torch.randn(7, 6)
    torch.testing.assert_close(program.module()(rows, **given), other(rows))
    assert not set(program.state_dict) & {"head.weight", "head.bias", "body.1.weight"}


def test_names_that_no_argument_may_have():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(3, 3)})
            self.a_b, self.x = nn.Linear(3, 3), nn.Linear(3, 3)
            setattr(self, "0", nn.Linear(3, 3))

        def forward(self, x):
            return getattr(self, "0")(self.x(self.a_b(self.a["b"](x))))

    model, x = fill_vectors(onelora.adapt(Odd().eval()), 0.1), torch.randn(2, 3)
    program = export_program(model, (x,), adapters="input")
    assert list(onelora.vectors(model)) == ["a.b", "a_b", "x", "0"]
    assert list(program.example_inputs[1]) == ["a_b", "a_b_1", "x_1", "_0"]
    given = dict(zip(program.example_inputs[1], onelora.vectors(model).values(), strict=True))
    torch.testing.assert_close(program.module()(x, **given), model(x))


def test_results_stand_as_the_model_gives_them():
    class Several(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.own, self.form = nn.Linear(3, 3), form

        def forward(self, pair, scale=2.0):
            return self.form(self.own(pair["left"]) * scale, pair["right"] + 1)

    pair = {"left": torch.randn(2, 3), "right": torch.randn(2, 3)}
    for form in (lambda a, b: a, lambda a, b: (a, b), lambda a, b: {"a": a, "b": (b, b)}):
        model = fill_vectors(onelora.adapt(Several(form).eval()), 0.1)
        program = export_program(model, (pair,), {"scale": 3.0})
        found, wanted = program.module()(pair["left"], pair["right"]), model(pair, scale=3.0)
        if isinstance(wanted, dict):
            wanted = {"a": wanted["a"], "b.0": wanted["b"][0], "b.1": wanted["b"][1]}
        torch.testing.assert_close(found, wanted)


def test_a_cache_is_tensors():
    from transformers import DynamicCache

    model, inputs = paths.build("llama")
    fill_vectors(onelora.adapt(model), 0.02)
    ids = inputs["input_ids"]
    with torch.no_grad():
        past = model(ids[:, :4], past_key_values=DynamicCache(), use_cache=True).past_key_values
    program = export_program(model, (), {"input_ids": ids[:, 4:5], "past_key_values": past, "use_cache": True})
    given = program.example_inputs[1]
    assert "past_key_values_0_key" in given
    found = program.module()(**given)
    with torch.no_grad():
        wanted = model(ids[:, 4:5], past_key_values=copy.deepcopy(past), use_cache=True)
    torch.testing.assert_close(found["logits"], wanted.logits)
    torch.testing.assert_close(found["present.1.value"], wanted.past_key_values.layers[1].values)
    assert past.get_seq_length() == 4


@pytest.mark.parametrize("mode", MODES)
def test_sizes_vary_as_torch_export_spells_them(mode):
    model, x = small(), torch.randn(4, 6)
    given = as_inputs(onelora.vectors(model)) if mode == "input" else {}
    for shapes in (
        {"x": {0: "rows"}},
        ({0: torch.export.Dim("rows", max=64)},),
        {"x": {0: torch.export.Dim.AUTO}},
        "rows",
    ):
        module = export_program(model, (x,), adapters=mode, dynamic_shapes=shapes).module()
        rows = torch.randn(9, 6)
        torch.testing.assert_close(module(rows, **given), model(rows))
    with pytest.raises(onelora.ExportError, match="specialized it to be a constant"):
        export_program(model, (x,), adapters=mode, dynamic_shapes={"x": {1: "features"}})
    with pytest.raises(onelora.ConfigError, match="names 'y'"):
        export_program(model, (x,), adapters=mode, dynamic_shapes={"y": {0: "rows"}})


def test_a_vector_that_the_call_does_not_use_is_an_input_all_the_same():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, second=False):
            return self.other(x) if second else self.own(x)

    model, x = fill_vectors(onelora.adapt(Either().eval()), 0.1), torch.randn(2, 3)
    program = export_program(model, (x,), adapters="input")
    assert list(program.example_inputs[1]) == ["own", "other"]
    torch.testing.assert_close(program.module()(x, **onelora.vectors(model)), model(x))
