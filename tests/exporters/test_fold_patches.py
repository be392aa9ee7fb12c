"""A patch embedding that is adapted, a convolution whose windows do not overlap, goes into every float file."""

import copy

import onnx
import onnxruntime
import onnxsim
import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
CONFIG = onelora.OneLoRAConfig(target_modules=["patches", "head"])


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.patches(x)).flatten(2).mean(-1))


def adapted(base, seed):
    return fill_vectors(onelora.adapt(copy.deepcopy(base), CONFIG), 0.3, seed=seed)


def by_torchscript(base, path):
    torch.onnx.export(base, (X,), path, dynamo=False)


def by_dynamo(base, path):
    torch.onnx.export(base, (X,), path, dynamo=True, verbose=False)


def simplified(base, path):
    by_torchscript(base, path)
    onnx.save(onnxsim.simplify(onnx.load(path))[0], path)


def ours(mode):
    return lambda base, path: export_onnx(adapted(base, 1), (X,), path, adapters=mode, progress=False)


WRITERS = {
    "torchscript": by_torchscript,
    "dynamo": by_dynamo,
    "simplified": simplified,
    "load": ours("load"),
    "input": ours("input"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("writer", WRITERS)
def test_it_folds(writer, tmp_path):
    torch.manual_seed(0)
    base = Patches().eval()
    WRITERS[writer](base, tmp_path / "base.onnx")
    model = adapted(base, 2)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    fold_onnx(tmp_path / "base.onnx", tmp_path / "a.safetensors", tmp_path / "folded.onnx", progress=False)
    session = onnxruntime.InferenceSession(tmp_path / "folded.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    out = torch.from_numpy(out)
    assert_parity(out, merged_copy(model, torch.float64)(X.double()), merged_copy(model)(X), floor=16)
    assert (out - base(X)).abs().max() > 0.1
