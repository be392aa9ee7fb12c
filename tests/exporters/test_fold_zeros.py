"""Vectors whose weight a file does not hold, or not as one matrix: zeros need no place, others are named."""

import copy

import onnxruntime
import pytest
import torch
from onnx_tools import dynamo, torchscript
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import BaseMismatchError, ExportError
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

pytestmark = pytest.mark.filterwarnings("ignore")  # of the old exporter


class Pooled(nn.Module):
    """`pooler` is used where it is asked for, as that of a text encoder."""

    def __init__(self):
        super().__init__()
        self.layer, self.pooler = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, pooled=False):
        x = self.layer(x)
        return self.pooler(x) if pooled else x


@pytest.fixture(params=[dynamo, torchscript])
def case(request, tmp_path):
    torch.manual_seed(0)
    base, x = Pooled(), torch.randn(3, 8)
    request.param(copy.deepcopy(base), (x,), tmp_path / "m.onnx")
    return onelora.adapt(base), x, tmp_path


def folded(model, folder, **options):
    onelora.save_adapter(model, folder / "a.safetensors")
    return fold_onnx(folder / "m.onnx", folder / "a.safetensors", folder / "out.onnx", **options)


def test_a_trained_model_folds(case):
    """No gradient comes to what no forward uses: its vector stays zero."""
    model, x, folder = case
    optimizer = torch.optim.AdamW(onelora.trainable_parameters(model), lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    report = folded(model, folder)
    assert report.skipped == {"pooler": "its vector is zero, so there is nothing to fold"}
    assert "pooler" in str(report)
    assert set(report.folded) == {"layer"}
    session = onnxruntime.InferenceSession(folder / "out.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    exact, plain = merged_copy(model, torch.float64)(x.double()), merged_copy(model)(x)
    assert_parity(torch.from_numpy(found), exact, plain)


def test_a_vector_that_is_not_zero_is_refused_unless_asked(case):
    model, _, folder = case
    for vector in onelora.vectors(model).values():
        vector.data.fill_(0.1)
    with pytest.raises(ExportError, match=r"1 of 2 vectors have no place .*pooler: .*on_unmatched='skip'"):
        folded(model, folder)
    assert not (folder / "out.onnx").exists()
    assert set(folded(model, folder, on_unmatched="skip").skipped) == {"pooler"}


def test_zeros_alone_do_not_hide_another_base(case):
    _, _, folder = case
    with pytest.raises(BaseMismatchError, match="is not the base of the adapter"):
        folded(onelora.adapt(Pooled()), folder)


def test_experts_are_told_what_to_do(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x):
            return torch.bmm(x, self.w)

    base, x = Experts(), torch.randn(3, 5, 8)
    dynamo(copy.deepcopy(base), (x,), tmp_path / "m.onnx")
    model = fill_vectors(onelora.adapt(base), 0.1)
    with pytest.raises(ExportError, match=r"w: no weight of its shape \(of experts or heads, .* by export_onnx\)"):
        folded(model, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_layer_of_anything_that_no_forward_uses(case, value):
    """Memory that nothing wrote to: the file that was saved could not be read again."""
    model, _, folder = case
    with torch.no_grad():
        model.get_submodule("pooler").get_parameter("weight")[2, 1] = value
        onelora.vectors(model)["layer"].fill_(0.5)
    assert set(folded(model, folder).folded) == {"layer"}
    vectors = {name: vector.clone() for name, vector in onelora.vectors(model).items()}
    onelora.load_adapter(model, folder / "a.safetensors")
    assert all(torch.equal(vector, vectors[name]) for name, vector in onelora.vectors(model).items())


@pytest.mark.parametrize("write", [dynamo, torchscript])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [8, 24])
def test_a_weight_with_numbers_that_are_none(write, value, width, tmp_path):
    """Its other rows are found and folded, and a layer of the same shape is as well."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)), torch.randn(3, 8)
    with torch.no_grad():
        base.get_parameter("1.weight")[2, 1] = value
    write(copy.deepcopy(base), (x,), tmp_path / "m.onnx")
    model = fill_vectors(onelora.adapt(base), 0.5)
    assert set(folded(model, tmp_path).folded) == {"0", "1"}
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    kept = torch.arange(8) != 2
    assert not found[:, ~kept].isfinite().any()
    exact, plain = merged_copy(model, torch.float64)(x.double()), merged_copy(model)(x)
    assert_parity(found[:, kept], exact[:, kept], plain[:, kept])
