"""One program of ExecuTorch, and several adapters as data files beside it: make test-runtimes."""

import functools

import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_program
from onelora_compile.exporters.calls.signature import identifiers
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

pytest.importorskip("executorch")
pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # of its exporter


class Held(nn.Module):
    """A program with its vectors as parameters."""

    def __init__(self, program, vectors):
        super().__init__()
        self.program = program.module()
        self.vectors = nn.ParameterDict(dict(zip(identifiers(vectors), vectors.values(), strict=True)))

    def forward(self, x):
        return self.program(x, **self.vectors)


def adapted(scale, seed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64)).eval()
    return fill_vectors(onelora.adapt(model), scale, seed)


def tag(name, node):
    """In which file a constant is; None is the program."""
    return name if "vectors" in str(node.target) else None


def written(program, model, name, folder):
    """The bytes of the program, with the vectors in NAME.ptd."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.external_constants_pass import delegate_external_constants_pass_unlifted

    given, place = (torch.randn(5, 64),), functools.partial(tag, name)
    held = torch.export.export(Held(program, onelora.vectors(model)), given).module()
    delegate_external_constants_pass_unlifted(held, gen_tag_fn=place)
    edge = to_edge_transform_and_lower(torch.export.export(held, given), partitioner=[XnnpackPartitioner()])
    lowered = edge.to_executorch(ExecutorchBackendConfig(external_constants=place))
    lowered.write_tensor_data_to_file(str(folder))
    return bytes(lowered.buffer)


def test_one_program_and_a_file_for_each_adapter(tmp_path):
    from executorch.runtime import Runtime

    models = {"a": adapted(0.1, 1), "b": adapted(0.1, 2), "none": adapted(0.0, 0)}
    program = export_program(models["a"], (torch.randn(5, 64),), adapters="input")
    first, *others = [written(program, model, name, tmp_path) for name, model in models.items()]
    assert others == [first] * 2
    (tmp_path / "model.pte").write_bytes(first)
    x = torch.randn(5, 64)
    for name, model in models.items():
        data = tmp_path / f"{name}.ptd"
        assert data.stat().st_size < len(first) / 8
        loaded = Runtime.get().load_program(tmp_path / "model.pte", data_path=data)
        (found,) = loaded.load_method("forward").execute([x])
        assert_parity(found.clone(), merged_copy(model, torch.float64)(x.double()), merged_copy(model)(x), floor=8)
