"""Weights compressed by NNCF after an adapter went in, and beside vectors that are inputs: make test-runtimes.

The oracle has each weight as the compressed constants of OpenVINO's graph give it, in float64.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import onelora_compile as onelora
from onelora_compile.exporters import export_program
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

openvino = pytest.importorskip("openvino")
nncf = pytest.importorskip("nncf")
pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # of converters
BITS: dict[int, dict[str, Any]] = {
    8: {"mode": "INT8_ASYM"},
    4: {"mode": "INT4_ASYM", "group_size": 32, "all_layers": True},
}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # else activations become int8


def adapted(seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    return fill_vectors(onelora.adapt(model), 0.05, seed)


def compressed(program, bits):
    how = BITS[bits] | {"mode": getattr(nncf.CompressWeightsMode, BITS[bits]["mode"])}
    return nncf.compress_weights(openvino.convert_model(program), **how)


def values(constant):
    """The numbers of a constant, float64; of four bits the lower half of a byte comes first."""
    found, shape = constant.get_data(), tuple(constant.get_output_shape(0))
    if constant.get_element_type() == openvino.Type.u4:
        found = np.stack([found & 15, found >> 4], -1)
    return found.astype("f8").reshape(shape)


@torch.no_grad()
def rounded(model, graph):
    """The model in float64 with the numbers of the graph, each within what rounding takes away."""
    held = {one.get_friendly_name(): one for one in graph.get_ops() if one.get_type_name() == "Constant"}
    names = [name for name in held if f"{name}/scale" in held]
    assert len(names) == 2
    for name in names:
        numbers, zero, scale = (values(held[f"{name}{part}"]) for part in ("", "/zero_point", "/scale"))
        matrix = torch.from_numpy((numbers - zero) * scale).flatten(1)
        (layer,) = (one for one in model if isinstance(one, nn.Linear) and one.weight.shape == matrix.shape)
        assert 0 < (matrix - layer.weight).abs().max() < 0.6 * scale.max()
        layer.weight.copy_(matrix)
    return model


def check(compiled, given, twin, x):
    found = torch.from_numpy(compiled([one.detach().numpy() for one in given])[0])
    assert_parity(found, twin(x.double()), copy.deepcopy(twin).float()(x), floor=8)
    return found


@pytest.mark.parametrize("bits", list(BITS))
def test_after_folding(bits):
    model, x = adapted(), torch.randn(5, 64)
    graph = compressed(export_program(model, (x,), dynamic_shapes=({0: "batch"},)), bits)
    check(openvino.compile_model(graph, "CPU", EXACT), [x], rounded(merged_copy(model, torch.float64), graph), x)


@pytest.mark.parametrize("bits", list(BITS))
def test_beside_vectors_that_are_swapped(bits):
    model, x = adapted(), torch.randn(5, 64)
    graph = compressed(export_program(model, (x,), adapters="input", dynamic_shapes=({0: "batch"},)), bits)
    compiled = openvino.compile_model(graph, "CPU", EXACT)
    twin = rounded(onelora.detach(adapted()).double(), graph)
    found = []
    for one in (model, adapted(seed=1)):
        vectors, merged = onelora.vectors(one), copy.deepcopy(twin)
        for name, vector in vectors.items():
            merged.get_submodule(name).weight.data += vector.detach().double()[:, None]
        found.append(check(compiled, [x, *vectors.values()], merged, x))
    assert not torch.allclose(found[0], found[1], atol=1e-2)
