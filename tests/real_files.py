"""What folding into a published ONNX file must give, found without this package's way through a model.

Products are found in the file's protobuf, what arrives there is evaluated by onnx, and the oracle is the file with each
product once more beside itself, with the dense matrix b 1ᵀ in the place of its weight.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onelora_compile.adapting.config import OneLoRAConfig
from onelora_compile.weights.adapter_file import AdapterFile
from onelora_compile.weights.fingerprint import fingerprint

GATES = "oracle/gates"
_PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger", "ConvInteger")
_CONSTANT = ("Constant", "Identity", "Cast", "Mul", "Transpose", "Reshape")
Makers = dict[str, onnx.NodeProto | onnx.TensorProto]


def package_file(module: str, file: str) -> Path | None:
    """A file of an installed package, which is not imported; None where it is not there."""
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder, file)).is_file()), None)


@dataclasses.dataclass(frozen=True)
class Product:
    """An op that multiplies by a constant matrix.

    Attributes:
        graph: that holds it.
        op: the node.
        side: which input is the constant.
        x: the other one, in floating point.
        y: the product in floating point.
        window: the shape of the constant.
        matrix: its numbers, float32 [out_features, in_features].
    """

    graph: onnx.GraphProto
    op: onnx.NodeProto
    side: int
    x: str
    y: str
    window: tuple[int, ...]
    matrix: np.ndarray

    @property
    def path(self) -> str:
        """The module that an exporter named in the op, less the number of its call; "" if none."""
        parts = self.op.name.split("/")[1:-1] if self.op.name.startswith("/") else []
        return re.sub(r"_\d+$", "", ".".join(parts))

    def dense(self, vector: np.ndarray) -> np.ndarray:
        """b 1ᵀ as the op reads it."""
        matrix = np.repeat(vector[:, None], self.matrix.shape[1], 1)
        return np.ascontiguousarray(matrix.T if _turned(self.op, self.side) else matrix).reshape(self.window)


def layers(model: onnx.ModelProto) -> dict[str, list[Product]]:
    """The products of each layer by its module path, or a number; equal numbers of one path are one layer's."""
    found: dict[tuple[str, bytes], list[Product]] = {}
    for product in _products(model, model.graph, {}):
        found.setdefault((product.path, product.matrix.tobytes()), []).append(product)
    named: dict[str, list[Product]] = {}
    for index, ((path, _), group) in enumerate(found.items()):
        named[path if path and path not in named else f"linear.{index}"] = group
    return named


def _products(model: onnx.ModelProto, graph: onnx.GraphProto, outer: Makers) -> Iterator[Product]:
    known = outer | {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in _CONSTANT and all(name in known for name in node.input):
            known |= dict.fromkeys(node.output, node)
        for held in node.attribute:
            if held.type == onnx.AttributeProto.GRAPH:
                yield from _products(model, held.g, known)
        sides = [side for side in (0, 1) if node.op_type in _PRODUCTS and node.input[side] in known]
        if len(sides) != 1 or _attribute(node, "group", 1) != 1:
            continue
        numbers = _numbers(model, known, node.input[sides[0]])
        x, y = node.input[1 - sides[0]], node.output[0]
        if node.op_type.endswith("Integer"):
            x, y, numbers = _floating(model, graph, node, known, numbers)
        convolution = node.op_type.startswith("Conv")
        if numbers.ndim < 2 or any(size != 1 for size in numbers.shape[2:]) or (numbers.ndim > 2 and not convolution):
            continue
        matrix = numbers.reshape(numbers.shape[:2]).astype(np.float32)
        matrix = np.ascontiguousarray(matrix.T if _turned(node, sides[0]) else matrix)
        yield Product(graph, node, sides[0], x, y, numbers.shape, matrix)


def _floating(
    model: onnx.ModelProto, graph: onnx.GraphProto, node: onnx.NodeProto, known: Makers, q: np.ndarray
) -> tuple[str, str, np.ndarray]:
    """x, y and the weight of an integer product, in floating point, as ONNX Runtime's quantiser writes it."""
    makers = {name: one for one in graph.node for name in one.output}
    users = {name: one for one in graph.node for name in one.input}
    cast = users[node.output[0]]
    mul = users[cast.output[0]]
    scales = makers[next(name for name in mul.input if name != cast.output[0])]
    assert [cast.op_type, mul.op_type, scales.op_type] == ["Cast", "Mul", "Mul"]
    scale = _numbers(model, known, next(name for name in scales.input if name in known))
    zero = _numbers(model, known, node.input[3]) if len(node.input) > 3 else np.zeros((), q.dtype)
    assert scale.size == zero.size == 1
    return makers[node.input[0]].input[0], mul.output[0], (q.astype(np.float32) - np.float32(zero)) * scale


def _turned(op: onnx.NodeProto, side: int) -> bool:
    """Whether the constant is [in_features, out_features]."""
    flag = _attribute(op, "transB" if side else "transA", 0)
    return not op.op_type.startswith("Conv") and bool(side) != bool(flag)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((one.i for one in node.attribute if one.name == name), default)


def _numbers(model: onnx.ModelProto, known: Makers, name: str) -> np.ndarray:
    maker = known[name]
    if isinstance(maker, onnx.TensorProto):
        return numpy_helper.to_array(maker)
    given = [numpy_helper.from_array(_numbers(model, known, one), one) for one in maker.input]
    graph = helper.make_graph([maker], "g", [], [onnx.ValueInfoProto(name=name)], given)
    (value,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import)).run(None, {})
    return np.asarray(value)


def adapter_of(found: Mapping[str, list[Product]], scale: float) -> AdapterFile:
    """An adapter with a random vector for each layer, about `scale` of what the layer gives for noise."""
    generator = np.random.default_rng(1)
    vectors, prints = {}, {}
    for name, (product, *_) in found.items():
        matrix = product.matrix
        size = float(np.sqrt(np.mean(np.square(matrix)))) or 1 / math.sqrt(matrix.size)
        vectors[name] = torch.from_numpy((scale * size * generator.standard_normal(len(matrix))).astype(np.float32))
        prints[name] = fingerprint(torch.from_numpy(matrix))
    uses = {name: (len(products), len(products)) for name, products in found.items()}  # as adapt counts in the model
    return AdapterFile(OneLoRAConfig(), vectors, {}, prints, "test", uses=uses)


def put_beside(model: onnx.ModelProto, found: Mapping[str, list[Product]], adapter: AdapterFile) -> None:
    """Add op(x, b 1ᵀ) to each product of the layers; the input GATES [layers], ones, takes single ones away again."""
    gates = helper.make_tensor_value_info(GATES, onnx.TensorProto.FLOAT, [len(found)])
    model.graph.input.append(gates)
    for index, (name, group) in enumerate(found.items()):
        gate = f"oracle/{name}/gate"
        model.graph.initializer.append(numpy_helper.from_array(np.array(index), f"{gate}/at"))
        model.graph.node.insert(0, helper.make_node("Gather", [GATES, f"{gate}/at"], [gate], name=gate))
        for call, product in enumerate(group):
            held = f"oracle/{name}/{call}"
            dense = product.dense(adapter.vectors[name].numpy())
            model.graph.initializer.append(numpy_helper.from_array(dense, f"{held}/w"))
            given = [product.x, f"{held}/w"] if product.side else [f"{held}/w", product.x]
            again = helper.make_node(product.op.op_type.removesuffix("Integer"), given, [f"{held}/b"], name=f"{held}/b")
            again.attribute.extend(product.op.attribute)
            nodes = product.graph.node
            at = next(index for index, node in enumerate(nodes) if product.y in node.output)
            nodes[at].output[list(nodes[at].output).index(product.y)] = f"{held}/y"
            gated = helper.make_node("Mul", [f"{held}/b", gate], [f"{held}/gated"], name=f"{held}/gated")
            total = helper.make_node("Add", [f"{held}/y", f"{held}/gated"], [product.y], name=f"{held}/total")
            for offset, node in enumerate((again, gated, total)):
                nodes.insert(at + 1 + offset, node)


class Session:
    """A file in ONNX Runtime, on one thread."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        """The first output, float64."""
        given: np.ndarray = self.session.run(None, dict(feed))[0]
        return given.astype(np.float64)


def without_last_activation(model: onnx.ModelProto) -> None:
    """Make the first output what its Softmax or Sigmoid was given: these hide what moves a certain answer."""
    makers = {name: node for node in model.graph.node for name in node.output}
    node = makers[model.graph.output[0].name]
    while node.op_type == "Identity":
        node = makers[node.input[0]]
    if node.op_type in ("Softmax", "Sigmoid"):
        node.op_type = "Identity"
        del node.attribute[:]
