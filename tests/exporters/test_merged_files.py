"""A file that holds the exported graph several times: both copies bear one module's paths, and neither is chosen."""

import copy

import onnx
import onnx_tools as tools
import pytest
import torch
from onnx import compose
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import ExportError
from onelora_compile.exporters import export_onnx, fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x)))


class Twice(Once):
    def forward(self, x):
        return self.out(torch.tanh(self.fc(torch.sin(self.fc(x)))))


def own(model, args, path):
    export_onnx(model, args, path)
    return path


WRITERS = {"own": own, "dynamo": tools.dynamo, "dynamo_plain": tools.dynamo_plain, "torchscript": tools.torchscript}
TIMES = {Once: "once", Twice: "2 times"}
PREFIXES = [("student/", "teacher/"), ("a_", "b_"), ("", "ref.")]


def written(kind, writer, folder):
    """The file of a base, its adapted model, and the adapter's file."""
    torch.manual_seed(0)
    base, x = kind().eval(), torch.randn(4, 8)
    path = WRITERS[writer](base, (x,), folder / "m.onnx")
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.3)
    onelora.save_adapter(model, folder / "a.safetensors")
    return path, model, x


def joined(path, prefixes, out, serial):
    """The file twice in one, the second copy behind the first or beside it."""
    model = onnx.load(path)
    one, other = (compose.add_prefix(model, prefix) if prefix else model for prefix in prefixes)
    if serial:
        onnx.save(compose.merge_models(one, other, [(one.graph.output[0].name, other.graph.input[0].name)]), out)
        return
    one.graph.node.extend(other.graph.node)
    one.graph.initializer.extend(other.graph.initializer)
    one.graph.input.extend(other.graph.input)
    one.graph.output.extend(other.graph.output)
    onnx.save(one, out)


@pytest.mark.parametrize("serial", [True, False])
@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", TIMES)
def test_a_file_that_holds_the_graph_twice_is_refused(kind, writer, prefixes, serial, tmp_path):
    path, _, _ = written(kind, writer, tmp_path)
    joined(path, prefixes, tmp_path / "twice.onnx", serial)
    message = rf"fc: the same numbers are at .* \(one forward of the model uses it {TIMES[kind]}\)"
    with pytest.raises(ExportError, match=message):
        fold_onnx(tmp_path / "twice.onnx", tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", TIMES)
def test_the_graph_alone_is_folded(kind, writer, tmp_path):
    path, model, x = written(kind, writer, tmp_path)
    fold_onnx(path, tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    found = torch.from_numpy(tools.run(tmp_path / "out.onnx", (x,))).float()
    assert_parity(found, merged_copy(model, torch.float64)(x.double()), merged_copy(model)(x))
