"""Int4 decoders (MatMulNBits) with an adapter in onnxruntime-genai, against their own numbers: make test-runtimes.

The oracle has each weight as the file's numbers give it, read from the file's protobuf, and b 1ᵀ in float64.
"""

import copy

import numpy as np
import onnx
import pytest
import torch
from genai_runs import SHAPES, built, configured, generated
from generating import base_in, call, greedy
from onnx import numpy_helper

import onelora_compile as onelora
from onelora_compile.exporters import convert_adapter, export_onnx, fold_onnx
from onelora_compile.testing import fill_vectors, merged_copy

pytest.importorskip("onnxruntime_genai")
pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # of its builder
KINDS = ["llama", "qwen3", "gemma"]
FLOATS = 1  # accuracy_level of MatMulNBits: activations stay float32


def matrices(path):
    """The numbers of each MatMulNBits, float64 [out_features, in_features]."""
    model = onnx.load(path)
    held = {one.name: numpy_helper.to_array(one, str(path.parent)) for one in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        said = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        assert said["bits"] == 4
        assert said["accuracy_level"] == FLOATS
        packed = held[node.input[1]]  # [out_features, blocks, bytes], the lower half first
        numbers = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1).astype(np.float64)
        zeros = np.full(packed.shape[:2], 8.0)
        if len(node.input) > 3 and node.input[3]:
            halves = held[node.input[3]].reshape(len(packed), -1)
            zeros = np.stack([halves & 15, halves >> 4], -1).reshape(len(packed), -1)[:, : packed.shape[1]]
        scales = held[node.input[2]].reshape(packed.shape[:2]).astype(np.float64)
        matrix = ((numbers - zeros[..., None]) * scales[..., None]).reshape(len(packed), -1)
        found.append(torch.from_numpy(matrix[:, : said["K"]]))
    return found


@torch.no_grad()
def rounded(base, path):
    """The base with the numbers of the file; genai's builder packs query, key and value into one."""
    twin = copy.deepcopy(base).double()
    weights = {name: one.weight for name, one in twin.named_modules() if isinstance(one, torch.nn.Linear)}
    packed = [[f"model.layers.{i}.self_attn.{part}_proj" for part in "qkv"] for i in range(len(twin.model.layers))]
    together = {tuple(names): torch.cat([weights[name] for name in names]) for names in packed}
    left = set(weights)
    for matrix in matrices(path):
        near = {
            names: float((exact - matrix).norm() / exact.norm())
            for names, exact in ({(name,): exact for name, exact in weights.items()} | together).items()
            if exact.shape == matrix.shape
        }
        chosen = min(near, key=lambda names: near[names])
        assert 0.01 < near[chosen] < 0.2 < sorted([*near.values(), 1.0])[1]
        left -= set(chosen)
        for name, part in zip(chosen, matrix.split([len(weights[name]) for name in chosen]), strict=True):
            twin.get_submodule(name).weight = torch.nn.Parameter(part)
    assert left <= {"lm_head"}
    return twin


def quantized(source, out):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    one = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=False, accuracy_level=FLOATS)
    one.process()
    one.model.save_model_to_file(str(out))


def adapter(base, path, seed):
    model = fill_vectors(onelora.adapt(copy.deepcopy(base)), 0.05, seed)
    onelora.save_adapter(model, path)
    return onelora.vectors(model)


def wanted(twin, vectors, ends):
    """What eager generates over the file's numbers with an adapter, in float64."""
    model = onelora.adapt(copy.deepcopy(twin))
    with torch.no_grad():
        for name, vector in onelora.vectors(model).items():
            vector.copy_(vectors[name])
    return greedy(merged_copy(model), ends)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tool", ["quantizer", "builder"])
def test_an_adapter_is_folded_beside_int4(tool, kind, tmp_path):
    base = base_in(tmp_path / "base", kind)
    path = tmp_path / "model" / "model.onnx"
    if tool == "builder":
        ends = built(tmp_path / "base", tmp_path / "model", "int4", accuracy_level=FLOATS, block_size=32)
    else:
        ends = configured(tmp_path / "base", tmp_path / "model")
        export_onnx(base, (), tmp_path / "float.onnx", call(base), dynamic_shapes=SHAPES)
        quantized(tmp_path / "float.onnx", path)
    twin = rounded(base, path)
    assert generated(tmp_path / "model") == [greedy(twin, ends)]
    vectors = adapter(base, tmp_path / "a.safetensors", 1)
    report = fold_onnx(path, tmp_path / "a.safetensors", path)
    assert set(report.folded) == set(vectors)
    expected = wanted(twin, vectors, ends)
    assert expected != greedy(twin, ends)
    assert generated(tmp_path / "model") == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_swapped_beside_int4(kind, tmp_path):
    base = base_in(tmp_path / "base", kind)
    ends = configured(tmp_path / "base", tmp_path / "model")
    path, names = tmp_path / "model" / "model.onnx", ["a", "b", "none"]
    made = [adapter(base, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(names[:2], 1)]
    model = onelora.adapt(copy.deepcopy(base))
    onelora.save_adapter(model, tmp_path / "none.safetensors")
    export_onnx(model, (), tmp_path / "float.onnx", call(model), adapters="input", dynamic_shapes=SHAPES)
    quantized(tmp_path / "float.onnx", path)
    for name in names:
        convert_adapter(
            tmp_path / f"{name}.safetensors", tmp_path / f"{name}.onnx_adapter", like=tmp_path / "float.onnx"
        )
    twin = rounded(base, path)
    expected = [*(wanted(twin, vectors, ends) for vectors in made), greedy(twin, ends)]
    assert len({tuple(one) for one in expected}) == 3
    assert generated(tmp_path / "model", [tmp_path / f"{name}.onnx_adapter" for name in names]) == expected
