"""Every kind of linear in an export and in a fold: the same function, or refused by name."""

import numpy as np
import onnxruntime
import pytest
import torch
from linears import IN, LINEARS, OUT, OUTPUT, Model, built, long
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors

WEIGHT = [name for name, (_, what, _) in LINEARS.items() if what == "weight"]
# Their ops have no ONNX translation, or are none of tracing's: exported by nobody.
NOT_EXPORTED = {"fake_quantised"}
# What the exported call computes is W x + c, by a constant that the file holds: it folds, and is right.
FOLDED = ["cached", "argument_none", "read_twice"]


@pytest.mark.filterwarnings("ignore:The tensor attribute self.own.bias was assigned during export:UserWarning")
@pytest.mark.parametrize("mode", ["fold", "input"])
@pytest.mark.parametrize("name", ["pruned_bias", "parametrized_bias", "tensor_bias"])
def test_export_of_a_bias_that_is_no_parameter(name, mode, tmp_path):
    model, x = built(name)
    fill_vectors(onelora.adapt(model), 0.3)
    expected, bias = model(x), model.own.bias
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode)
    assert torch.equal(model.own.bias, bias)
    (out,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(out, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The tensor attribute self.own.bias was assigned during export:UserWarning")
@pytest.mark.parametrize("mode", ["fold", "load"])
@pytest.mark.parametrize("name", long([name for name in WEIGHT if name != "negative"]))
def test_export_folds_one_that_is_w_x(name, mode, tmp_path):
    model, x = built(name)
    fill_vectors(onelora.adapt(model), 0.3)
    report = export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode)
    assert report.vectors == 2
    (out,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(out, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_export_says_that_merge_may_take_what_it_can_not_fold(tmp_path):
    model, x = built("negative")
    fill_vectors(onelora.adapt(model), 0.3)
    expected = model(x)
    with pytest.raises(onelora.PassError, match=r"'own': .* if onelora.merge takes a copy of the model, export that"):
        export_onnx(model, (x,), tmp_path / "m.onnx")
    onelora.merge(model)
    torch.testing.assert_close(model(x), expected)
    export_onnx(model, (x,), tmp_path / "m.onnx")


def test_export_folds_a_residual_whose_weight_another_linear_has_too(tmp_path):
    model, x = built("residual")
    model.plain = nn.Linear(IN, IN)
    model.plain.weight = model.own.weight
    model.forward = lambda x: model.own(model.first(x)) * model.plain(model.first(x))
    fill_vectors(onelora.adapt(model, onelora.OneLoRAConfig(exclude_modules=["plain"])), 0.3)
    export_onnx(model, (x,), tmp_path / "m.onnx")
    (out,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(out, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", long(OUTPUT))
def test_fold_onnx_refuses_the_others_by_name(name, tmp_path):
    model, x = built(name)
    onelora.save_adapter(fill_vectors(onelora.adapt(model), 0.3), tmp_path / "a.safetensors")
    # Every weight of the base is in the file, under the names of the model: nothing but the kind speaks against it.
    plain = Model(nn.Linear(IN, OUT))
    if "weight" in model.own._parameters:
        plain.own.weight.data = model.own._parameters["weight"].detach().clone().view(OUT, IN)
    plain.first.weight.data, plain.first.bias.data = model.first.weight.data, model.first.bias.data
    export_onnx(plain, (x,), tmp_path / "base.onnx")
    with pytest.raises(onelora.ExportError, match=r"own: its module computes something else"):
        fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("mode", ["fold", "load"])
@pytest.mark.parametrize("name", long([name for name in OUTPUT if name not in {*NOT_EXPORTED, *FOLDED}]))
def test_export_refuses_to_fold_the_others_by_name(name, mode, tmp_path):
    model, x = built(name)
    fill_vectors(onelora.adapt(model), 0.3)
    with pytest.raises(onelora.OneLoRAError, match="'own'"):
        export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode)
    assert not (tmp_path / "m.onnx").exists()


MODES = {"input": [name for name in OUTPUT if name not in NOT_EXPORTED], "fold": FOLDED}  # others: see above


@pytest.mark.parametrize(
    ("name", "mode"), [pytest.param(*one.values, mode, marks=one.marks) for mode in MODES for one in long(MODES[mode])]
)
def test_export_is_the_same_function(name, mode, tmp_path):
    model, x = built(name)
    fill_vectors(onelora.adapt(model), 0.3)
    export_onnx(model, (x,), tmp_path / "m.onnx", adapters=mode)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(out, model(x).detach().numpy(), rtol=1e-3, atol=1e-3)
