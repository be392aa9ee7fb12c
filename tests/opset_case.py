"""One use of an operator as a model, and random numbers for it: what the cases of `opset_cases.py` are made of."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import helper, numpy_helper


@dataclasses.dataclass
class Case:
    """inputs: name to array, "" to None; those in `fixed` are constants; `lowest`: refused below it."""

    op: str
    inputs: dict
    since: int = 17
    lowest: int = 17
    fixed: str = ""
    outputs: int = 1
    tag: str = ""
    attributes: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        return f"{self.op}{self.tag and '-' + self.tag}"

    def model(self, opset, results=None):
        """At an opset; results give the outputs their types where the standard's inference does not."""
        names = [f"y{index}" for index in range(self.outputs)]
        given = ["" if array is None else name for name, array in self.inputs.items()]
        node = helper.make_node(self.op, given, names, name="here", **self.attributes)
        arrays = {name: array for name, array in self.inputs.items() if array is not None}
        graph = helper.make_graph(
            [node],
            "g",
            [value(name, array) for name, array in arrays.items() if name not in self.fixed.split()],
            [helper.make_empty_tensor_value_info(name) for name in names],
            [tensor(arrays[name], name) for name in self.fixed.split()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=13)
        made = onnx.shape_inference.infer_shapes(made)
        for output, array in zip(made.graph.output, results or [], strict=False):
            kind = output.type.WhichOneof("value")
            if kind is None or (kind == "tensor_type" and not output.type.tensor_type.HasField("shape")):
                output.CopyFrom(value(output.name, array))
        return made

    def feed(self):
        fixed = self.fixed.split()
        return {name: np.asarray(a) for name, a in self.inputs.items() if a is not None and name not in fixed}


def tensor(array, name):
    return numpy_helper.from_array(np.asarray(array), name)


def value(name, array):
    if isinstance(array, list):  # a sequence
        return helper.make_tensor_sequence_value_info(name, tensor(array[0], "").data_type, None)
    return helper.make_tensor_value_info(name, tensor(array, "").data_type, np.asarray(array).shape)


rng = np.random.default_rng(0)


def x(*shape, dtype=np.float32, low=0.1, high=0.9):
    return rng.uniform(low, high, shape).astype(dtype)


def case(op, *arrays, tag="", since=17, lowest=17, fixed="", outputs=1, **attributes):
    return Case(op, {f"x{i}": a for i, a in enumerate(arrays)}, since, lowest, fixed, outputs, tag, attributes)
