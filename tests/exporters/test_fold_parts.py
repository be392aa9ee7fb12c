"""Weights that a model reads in parts, as the exporters of torch.onnx write them: folded right, or refused by name."""

import copy
import re

import numpy as np
import onnx
import onnx_tools as tools
import onnxruntime
import pytest
import torch
from form_parts import module
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.errors import ExportError, OneLoRAError
from onelora_compile.exporters import fold_onnx
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


def total(x, parts):
    """A number for each x, another function of each part."""
    return sum(number * F.linear(x, part).square().sum(-1, True) for number, part in enumerate(parts, 1))


def row(number):
    return torch.tensor(number)


def by(weights):
    """A forward that uses the parts w, n, c -> parts gives of a weight [n, c]."""
    return lambda s, x: total(x, weights(s.w, s.n, s.c))


SIZES = ((24, 8), (192, 128))  # dynamo's exporter computes parts of the small one
ALL = ("dynamo", "dynamo_plain", "torchscript", "torchscript_plain")
NO_SEQUENCE = ("dynamo", "torchscript", "torchscript_plain")  # dynamo_plain writes SplitToSequence
PLAIN = ("dynamo_plain", "torchscript_plain")  # no tool computed the parts

# name -> (forward, the exporters of which the file must fold, whatever the size is)
KINDS = {
    "split": (by(lambda w, n, c: w.split([n // 4, n // 2, n // 4])), NO_SEQUENCE),
    "split_transposed": (by(lambda w, n, c: [one.t() for one in w.t().split(n // 3, 1)]), NO_SEQUENCE),
    "split_multiplied": (lambda s, x: sum((x @ one.t()).square() for one in s.w.split(s.n // 4)), NO_SEQUENCE),
    "split_whole": (by(lambda w, n, c: w.split(n)), NO_SEQUENCE),
    "chunk": (by(lambda w, n, c: w.chunk(3)), NO_SEQUENCE),
    "chunk_of_chunk": (by(lambda w, n, c: [two for one in w.chunk(2) for two in one.chunk(2)]), NO_SEQUENCE),
    "chunk_of_inputs": (
        lambda s, x: sum(F.linear(one, part) for one, part in zip(x.chunk(2, -1), s.w.chunk(2, 1), strict=True)),
        ("dynamo", "torchscript_plain"),
    ),
    "chunk_unused": (by(lambda w, n, c: [w.chunk(2)[1]]), ("dynamo", "torchscript_plain")),
    "tensor_split": (by(lambda w, n, c: w.tensor_split(3)), ("dynamo", "dynamo_plain")),
    "unbind": (by(lambda w, n, c: w.view(3, n // 3, c).unbind(0)), ALL),
    "select": (by(lambda w, n, c: [w.view(3, n // 3, c)[number] for number in range(3)]), ALL),
    "select_one": (by(lambda w, n, c: [w.view(3, n // 3, c)[1]]), PLAIN),
    "slice": (by(lambda w, n, c: [w[: n // 4], w[n // 4 :]]), ALL),
    "slice_transposed": (by(lambda w, n, c: [w.t()[:, : n // 4].t(), w[n // 4 :]]), ALL),
    "slice_multiplied": (lambda s, x: (x @ s.w.t()[:, :8]) * (x @ s.w[8:16].t()) + x @ s.w[16:24].t(), PLAIN),
    "slice_left": (lambda s, x: (s.w[:12] @ x.t() * (s.w[12:24] @ x.t())).t(), PLAIN),
    "slice_steps": (by(lambda w, n, c: [w[::2], w[1::2]]), PLAIN),
    "slice_overlap": (by(lambda w, n, c: [w[: n // 2], w[n // 4 :]]), PLAIN),
    "slice_one": (by(lambda w, n, c: [w[: n // 4]]), PLAIN),
    "slice_whole": (by(lambda w, n, c: [w[:]]), ALL),
    "slice_whole_range": (by(lambda w, n, c: [w[0:n]]), ALL),
    "slice_and_whole": (by(lambda w, n, c: [w, w[: n // 2]]), PLAIN),
    "chunk_and_whole": (by(lambda w, n, c: [w, *w.chunk(2)]), ("dynamo", "torchscript_plain")),
    "narrow": (by(lambda w, n, c: [w.narrow(0, 0, 8), w.narrow(0, 8, n - 8)]), ALL),
    "index": (by(lambda w, n, c: [w[[0, 2, 1]], w[[3, 5, 4]]]), ()),
    "index_whole": (by(lambda w, n, c: [w[torch.arange(n)]]), ("torchscript", "torchscript_plain")),
    "index_select": (by(lambda w, n, c: [w.index_select(0, row([0, 2])), w.index_select(0, row([3]))]), PLAIN),
    "flip": (by(lambda w, n, c: [w.flip(0)]), PLAIN),
    "roll": (by(lambda w, n, c: [w.roll(1, 0)]), ()),
    "cat": (by(lambda w, n, c: [torch.cat([w[n // 2 :], w[: n // 2]])]), ()),
    "one_row": (lambda s, x: (x @ s.w[0]).square()[:, None] + (x @ s.w[1])[:, None], ()),
    "scaled": (by(lambda w, n, c: [one * 2 for one in w.chunk(2)]), ()),
    "scaled_before": (by(lambda w, n, c: (w * 2).chunk(2)), ()),
    "squared_too": (lambda s, x: F.linear(x, s.w[:12]) + s.w[12:].square().sum(), ()),
    "addmm": (lambda s, x: x.new_ones(12).addmm(x, s.w[:12].t()) * x.new_ones(12).addmm(x, s.w[12:24].t()), PLAIN),
    "einsum": (lambda s, x: torch.einsum("bi,oi->bo", x, s.w[:12]) + torch.einsum("bi,oi->bo", x, s.w[-12:]), PLAIN),
    "einsum_of_heads": (lambda s, x: torch.einsum("bi,hoi->bho", x, s.w.view(3, s.n // 3, s.c)), PLAIN),
    "looked_up": (by(lambda w, n, c: [w, F.embedding(row([0, 1]), w)]), PLAIN),
    "looked_up_by_x": (lambda s, x: F.linear(x, s.w[:12]) + F.embedding(x[:, 0].long() % 4, s.w).sum(-1, True), ()),
    "summed_look_up": (lambda s, x: F.linear(x, s.w[:12]) + F.embedding(row([0, 1]), s.w).sum(), ()),
}
NAMED = {"index", "index_whole", "one_row", "flip", "roll", "cat", "scaled", "scaled_before"}  # by target_parameters
CASES = [(exporter, size) for exporter in ALL for size in SIZES if exporter == "dynamo" or size == SIZES[0]]


@pytest.mark.filterwarnings("ignore")  # of the old exporter
@pytest.mark.parametrize(("exporter", "size"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_parts(kind, exporter, size, tmp_path):
    torch.manual_seed(0)
    forward, folds = KINDS[kind]
    base = module(forward, w=nn.Parameter(torch.randn(size) / size[1] ** 0.5))
    base.n, base.c = size
    x = torch.randn(5, size[1])
    named = onelora.OneLoRAConfig(target_modules=[], target_parameters={"w": -1})
    model = fill_vectors(onelora.adapt(copy.deepcopy(base), named if kind in NAMED else None), 0.1)
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    file = getattr(tools, exporter)(base, (x,), tmp_path / "base.onnx")
    refused = None
    try:
        fold_onnx(file, tmp_path / "a.safetensors", tmp_path / "out.onnx", progress=False)
    except OneLoRAError as error:
        refused = str(error)
    if refused is not None:
        assert exporter not in folds, refused
        assert re.search(r" w: | w \(|'w'", refused)
        assert not (tmp_path / "out.onnx").exists()
        return
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    plain, exact = merged_copy(model)(x), merged_copy(model, torch.float64)(x.double())
    assert_parity(torch.from_numpy(found), exact, plain, kind)


make, info, kinds = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto


def written(path, arrays, nodes, outputs):
    inits = [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in arrays.items()]
    named = [info(name, kinds.FLOAT, None) for name in outputs]
    graph = onnx.helper.make_graph(nodes, "g", [info("x", kinds.FLOAT, (3, 8))], named, inits)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)


def adapted(folder, **weights):
    """The file of an adapter of linears without biases, and their vectors, float64."""
    layers = nn.ModuleDict({name: nn.Linear(8, len(one), bias=False) for name, one in weights.items()})
    with torch.no_grad():
        for name, one in weights.items():
            layers.get_parameter(f"{name}.weight").copy_(torch.from_numpy(one))
    torch.manual_seed(1)
    fill_vectors(onelora.adapt(layers), 0.5)
    onelora.save_adapter(layers, folder / "a.safetensors")
    vectors = {name: one.detach().double().numpy() for name, one in onelora.vectors(layers).items()}
    return folder / "a.safetensors", vectors


def test_parts_of_two_layers(tmp_path):
    """Two weights whose parts stand one behind another, and other weights between them."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(12, 8)).astype(np.float32) for _ in range(2))
    x = rng.normal(size=(3, 8)).astype(np.float32)
    file, vectors = adapted(tmp_path, a=a, b=b)
    other = rng.normal(size=(8, 6)).astype(np.float32)
    arrays = {"a0": a[:3].T, "a1": a[3:].T, "o0": other, "b0": b[:6].T, "b1": b[6:9].T, "b2": b[9:].T, "o1": other}
    nodes = [make("MatMul", ["x", name], [f"y_{name}"]) for name in arrays]
    written(tmp_path / "m.onnx", arrays, nodes, [f"y_{name}" for name in arrays])
    report = fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
    assert {name: one.where for name, one in report.folded.items()} == {"a": ("a0", "a1"), "b": ("b0", "b1", "b2")}
    before, found = (
        dict(zip(arrays, onnxruntime.InferenceSession(tmp_path / name).run(None, {"x": x}), strict=True))
        for name in ("m.onnx", "out.onnx")
    )
    for name, weight in (("a", a), ("b", b)):
        wide = torch.from_numpy(weight).double() + torch.from_numpy(vectors[name])[:, None]
        exact, plain = torch.from_numpy(x).double() @ wide.T, torch.from_numpy(x) @ wide.float().T
        parts = np.concatenate([one for key, one in found.items() if key.startswith(name)], 1)
        assert_parity(torch.from_numpy(parts), exact, plain, name)
    for name in ("o0", "o1"):
        assert np.array_equal(found[name], before[name])


def test_a_part_that_is_another_layers_weight_too_is_refused(tmp_path):
    """The numbers of "q" are a part of "packed" and stand alone too: nothing tells whose the part is."""
    rng = np.random.default_rng(0)
    packed = rng.normal(size=(12, 8)).astype(np.float32)
    file, _ = adapted(tmp_path, packed=packed, q=packed[4:8])
    arrays = {"w": packed.T, "v": packed[4:8].T, "sizes": np.array([4, 4, 4])}
    nodes = [
        make("Split", ["w", "sizes"], ["p0", "p1", "p2"], axis=1),
        *(make("MatMul", ["x", name], [f"y_{name}"]) for name in ("p0", "p1", "p2", "v")),
    ]
    written(tmp_path / "m.onnx", arrays, nodes, ["y_p0", "y_p1", "y_p2", "y_v"])
    with pytest.raises(ExportError, match=r"q: the same numbers are at v, p1, used by MatMul, MatMul"):
        fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
