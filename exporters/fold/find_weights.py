"""Find the weights of an ONNX model, whatever wrote it, and what each is used for.

A weight is a constant matrix: an initializer or a Constant node, in the main graph or in a body of If and Loop; stored
as it is, or quantised.  A use is a way from there, through ops that only move or convert values, to the op that
computes with it; of a quantised weight it is the product alone, with the matrix that arrives there.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import require
from onelora_compile.exporters.onnx_file.constants import DOMAINS, Constants
from onelora_compile.exporters.onnx_file.load import by_rows
from onelora_compile.exporters.quantized.products import CONVOLUTIONS, Product, factors_of, products_of
from onelora_compile.weights.fingerprint import signs

if TYPE_CHECKING:
    import onnx_ir

PASSED = {"Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Reshape"}
_CUTS = {"Split", "Slice"}
# Rows by constant indices: parts of a read weight, or a look-up in an embedding's.
_PICKS = {"Gather", "GatherND"}
_QUESTIONS = {"Shape", "Size"}
# What reads a weight as a table or its shape; an adapted layer's is not meant.
_READS = {*_PICKS, *_QUESTIONS, "GatherElements", "EmbedLayerNormalization", "SkipLayerNormalization"}


@dataclasses.dataclass(frozen=True, eq=False)
class WeightUse:
    """One way of a weight to an op.

    Attributes:
        nodes: what it passes, the op that computes last.
        position: the input of that op.
        product: the op with its matrix, of a quantised weight.
        across: the op multiplies by the transpose of the weight; only of a quantised one.
        constant: what the op gives is constant too, and a weight of its own where a linear op reads it.
        parts: the ways of the parts that the op takes from the weight, and of their parts, where all of them end in
            linear ops.
        ends: what reads what the op computes from constants alone, op and position.
    """

    nodes: tuple[onnx_ir.Node, ...]
    position: int
    product: Product | None = None
    across: bool = False
    constant: bool = False
    parts: tuple[WeightUse, ...] = ()
    ends: tuple[tuple[onnx_ir.Node, int], ...] = ()

    @property
    def op(self) -> onnx_ir.Node:
        """The op that computes with the weight."""
        return self.nodes[-1]

    @property
    def linear(self) -> bool:
        """Whether the op is linear in another input; a Gather of an embedding is not."""
        return self.product is not None or self.position in factors_of(self.op)

    @property
    def strange(self) -> bool:
        """Whether the op does with the weight what is neither linear nor a look-up; what constants give is followed."""
        return not self.linear and not self.constant and self.op.op_type not in _READS

    @property
    def takes_parts(self) -> bool:
        """Whether the op cuts the weight up."""
        return self.constant and self.op.op_type in _CUTS

    @property
    def picked(self) -> bool:
        """Whether it passes an op that picks rows, as a look-up does."""
        return any(node.op_type in _PICKS for node in self.nodes)

    @property
    def cut(self) -> bool:
        """Whether it passes an op that cuts the weight up."""
        return any(node.op_type in _CUTS for node in self.nodes)

    @property
    def modules(self) -> tuple[str, ...]:
        """Where exporters say that the op comes from: module paths, innermost last; empty if they do not."""
        scopes = self.op.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes:
            try:
                return tuple(str(scope) for scope in ast.literal_eval(scopes))[:-1]  # the last is the op itself
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                return ()
        name = self.op.name or ""
        return (".".join(name.strip("/").split("/")[:-1]),) if name.startswith("/") else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A constant matrix of a model.

    Attributes:
        value: the graph's value that holds its numbers, or the quantised ones.
        shape: (rows, columns) of the matrix as it is stored; of a quantised one [out_features, in_features] of its
            first use.
        dtype: of storage: "float32", …, "int8", "int4".
        uses: what it is used for.
        computed: the tensor, where ops compute it from constants.
    """

    value: onnx_ir.Value
    shape: tuple[int, int]
    dtype: str
    uses: tuple[WeightUse, ...]
    computed: Any = None

    @property
    def tensor(self) -> Any:
        """The numbers as they are stored, or as constants give them."""
        return self.value.const_value if self.computed is None else self.computed

    @property
    def name(self) -> str:
        """Of the initializer."""
        return self.value.name or "a constant"

    @property
    def ways(self) -> tuple[WeightUse, ...]:
        """Its uses, with those of its parts in the place of the op that cuts it up."""
        return tuple(one for use in self.uses for one in (use.parts or (use,)))

    @property
    def quantized(self) -> bool:
        """Whether its numbers are quantised, and stay as they are."""
        return any(use.product is not None for use in self.uses)

    def by_rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """The numbers, floating point, some rows [n, columns] at a time with the first one's number."""
        product = self.uses[0].product if self.uses else None
        if product is not None:
            yield 0, np.ascontiguousarray(product.matrix())
        else:
            yield from by_rows(self.tensor, self.shape)


def weights_of(model: onnx_ir.Model) -> list[Weight]:
    """The weights of a model: the quantised ones, then the others in the order of its graphs, then computed ones."""
    constants = Constants(model)
    found = list(_quantized(products_of(model, constants)))
    stored: set[onnx_ir.Value] = set()
    for value in constants_of(model):
        tensor = value.const_value
        if tensor is None or not _floating(tensor):
            continue
        if shape := _matrix(tuple(tensor.shape)) or _kernel(value, tuple(tensor.shape)):
            stored.add(value)
            uses = [_followed(use, constants) for use in uses_of(value)]
            found.append(Weight(value, shape, tensor.dtype.name.lower(), tuple(uses)))
    found += _computed(model, constants, stored)
    names = {"float": "float32", "double": "float64"}
    return [dataclasses.replace(weight, dtype=names.get(weight.dtype, weight.dtype)) for weight in found]


def _followed(use: WeightUse, constants: Constants) -> WeightUse:
    """A use with what is constant behind it."""
    use = dataclasses.replace(use, constant=constants.known(use.op.outputs[0]))
    if not (use.constant and use.position == 0 and use.op.op_type in _CUTS | _PICKS):
        computes = use.constant and use.op.op_type not in _READS
        ends = [one for output in use.op.outputs for one in constants.readers(output)] if computes else []
        return dataclasses.replace(use, ends=tuple(one for one in ends if one[0].op_type not in _READS))
    parts = [part for output in use.op.outputs for one in uses_of(output, use.nodes) for part in _ways(one, constants)]
    return dataclasses.replace(use, parts=tuple(parts) if all(one.linear for one in parts) else ())


def _ways(part: WeightUse, constants: Constants) -> tuple[WeightUse, ...]:
    """Where a part of a weight goes: to an op, into parts of its own; what asks for its shape is nowhere."""
    if part.op.op_type in _QUESTIONS:
        return ()
    part = _followed(part, constants)
    return part.parts or (part,)


def _matrix(shape: tuple[Any, ...]) -> tuple[int, int] | None:
    """The shape of a matrix, also where a convolution's window or a batch gives it axes of size one."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape if len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape) else None


def _kernel(value: onnx_ir.Value, shape: tuple[Any, ...]) -> tuple[int, int] | None:
    """The matrix of the weight of a convolution, a row for each of its outputs: a linear map of patches."""
    read = any(use.node.op_type in CONVOLUTIONS and use.idx == 1 for use in value.uses())
    return (shape[0], prod(shape[1:])) if read and len(shape) > 2 and all(shape) else None


def _computed(model: onnx_ir.Model, constants: Constants, stored: set[onnx_ir.Value]) -> Iterator[Weight]:
    """What ops read that is computed from constants: parts of a weight, several put together, multiples."""
    ir = require("onnx_ir", "onnx", "fold into an ONNX model")
    seen: dict[onnx_ir.Value, list[WeightUse]] = {}
    for node in model.graph.all_nodes():
        for position in factors_of(node):
            value = node.inputs[position] if position < len(node.inputs) else None
            if value is not None and value.const_value is None and constants.known(value):
                seen.setdefault(value, []).append(WeightUse((node,), position))
    for value, uses in seen.items():
        if _origin(value) in stored or constants.leaves(value)[1] is not None:
            continue
        shape, dtype = constants.shape(value), constants.dtype(value)
        if matrix := _matrix(shape):
            others = [use for use in uses_of(value) if use.op not in {one.op for one in uses}]
            tensor = ir.LazyTensor(
                lambda value=value: ir.tensor(np.ascontiguousarray(constants.numbers(value))),
                dtype=dtype, shape=ir.Shape(shape), name=value.name,
            )  # fmt: skip
            yield Weight(value, matrix, dtype.name.lower(), (*uses, *others), tensor)


def _origin(value: onnx_ir.Value) -> onnx_ir.Value:
    """Where a value comes from through ops that only move or convert it."""
    node = value.producer()
    while node is not None and node.op_type in PASSED and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _quantized(products: Iterable[Product]) -> Iterator[Weight]:
    """The weights of products; one where they compute with the same matrix, or its transpose, of one stored tensor."""
    by_stored: dict[int, list[Product]] = {}
    for product in products:
        by_stored.setdefault(id(product.stored), []).append(product)
    for group in by_stored.values():
        uses: list[tuple[np.ndarray, list[WeightUse]]] = []
        for product in group:
            sketch = _sketch(product) if len(group) > 1 else np.zeros((4, 4))
            for known, own in uses:
                first = own[0].product
                assert first is not None
                if product.shape == first.shape and np.allclose(sketch, known, rtol=1e-4):
                    own.append(WeightUse((product.op,), product.position, product))
                    break
                if product.shape == first.shape[::-1] and np.allclose(_sketch(product, turned=True), known, rtol=1e-4):
                    own.append(WeightUse((product.op,), product.position, product, across=True))
                    break
            else:
                uses.append((sketch, [WeightUse((product.op,), product.position, product)]))
        for _, own in uses:
            first = own[0].product
            assert first is not None
            yield Weight(first.stored, first.shape, first.dtype, tuple(own))


def _sketch(product: Product, turned: bool = False) -> np.ndarray:
    """A projection of a product's matrix, or of its transpose, that tells two matrices apart: [4, 4]."""
    matrix = product.matrix().T if turned else product.matrix()
    sketch: np.ndarray = signs(matrix.shape[0], 0).T @ matrix @ signs(matrix.shape[1], 1)
    return sketch


def constants_of(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    """The values that are constants: initializers and what Constant nodes give, of all graphs."""
    ir = require("onnx_ir", "onnx", "fold into an ONNX model")
    for graph in [model.graph, *model.graph.subgraphs()]:
        inputs = set(graph.inputs) if graph is not model.graph else set()
        yield from (value for value in graph.initializers.values() if value not in inputs)
        for node in graph:
            if node.op_type == "Constant" and "value" in node.attributes:
                value = node.outputs[0]
                if value.const_value is None:
                    value.const_value = ir.convenience.get_const_tensor(value)
                yield value


def names_of(model: onnx_ir.Model) -> Iterator[str]:
    """Names of the values of all graphs: among them those of modules' parameters, where a tool kept them."""
    for graph in [model.graph, *model.graph.subgraphs()]:
        yield from graph.initializers
    for node in model.graph.all_nodes():
        yield from (value.name for value in node.outputs if value.name)


def uses_of(value: onnx_ir.Value, before: tuple[onnx_ir.Node, ...] = ()) -> Iterator[WeightUse]:
    """Every way from a value to an op that computes with it."""
    for user in value.uses():
        nodes = (*before, user.node)
        if user.node.op_type in PASSED and user.node.domain in DOMAINS and user.idx == 0 and len(nodes) < 16:
            yield from uses_of(user.node.outputs[0], nodes)
        else:
            yield WeightUse(nodes, user.idx)


def _floating(tensor: Any) -> bool:
    return bool(tensor.dtype.is_floating_point()) and tensor.dtype.bitwidth >= 16
