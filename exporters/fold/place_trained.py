"""Put trained heads and norms of an adapter into an ONNX model, each in the place of its base value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from onelora_compile.errors import MergeError, require
from onelora_compile.exporters.fold.parameter_reads import OPTIONAL_BIAS, ParameterRead, TrainedPlaces
from onelora_compile.exporters.onnx_file.overridable import fix

if TYPE_CHECKING:
    import onnx_ir


def fold_trained(model: onnx_ir.Model, places: TrainedPlaces, values: dict[str, Tensor]) -> None:
    """Change a model: constants that a parameter has alone get its value, other reads a constant of their own.

    A bias that was dropped is added again.
    """
    ir: Any = require("onnx_ir", "onnx", "fold into an ONNX model")
    for name, reads in places.reads.items():
        by_constant: dict[tuple[onnx_ir.Value, bool], list[ParameterRead]] = {}
        for read in reads:
            by_constant.setdefault((read.value, read.transposed), []).append(read)
        for (value, transposed), own in by_constant.items():
            _replace(ir, model, name, value, own, values[name].T if transposed else values[name])
    for name, behind in places.dropped.items():
        for read, shape in behind:
            _add_bias(ir, model, name, read, values[name].reshape(shape))


def _replace(
    ir: Any, model: onnx_ir.Model, name: str, value: onnx_ir.Value, reads: list[ParameterRead], numbers: Tensor
) -> None:
    held: Any = value.const_value
    tensor = _tensor(ir, numbers.reshape(tuple(held.shape)), held.dtype, name, value.name)
    firsts = {(read.use.nodes[0], _position(read, value)) for read in reads}
    everything = {(use.node, use.idx) for use in value.uses()}
    if firsts == everything and not value.is_graph_output() and value.producer() is None and not _forked(reads):
        value.const_value = tensor
        return
    fix(value)
    own = _initializer(ir, model, f"{name}.trained", tensor)
    for read in reads:
        before = own
        for node in read.use.nodes[:-1]:
            copy = ir.node(node.op_type, [before, *node.inputs[1:]], node.attributes, domain=node.domain)
            assert node.graph is not None
            node.graph.insert_before(node, copy)
            copy.outputs[0].shape = node.outputs[0].shape
            if node.outputs[0].dtype is not None:
                copy.outputs[0].dtype = node.outputs[0].dtype
            before = copy.outputs[0]
        read.use.op.replace_input_with(read.use.position, before)


def _position(read: ParameterRead, value: onnx_ir.Value) -> int:
    return read.use.position if len(read.use.nodes) == 1 else 0


def _forked(reads: list[ParameterRead]) -> bool:
    """Whether a node on the way has other readers than these."""
    ends = {(read.use.op, read.use.position) for read in reads}
    between = {node for read in reads for node in read.use.nodes[:-1]}
    users = [(use.node, use.idx) for node in between for use in node.outputs[0].uses()]
    return any(user not in ends and user[0] not in between for user in users)


def _add_bias(ir: Any, model: onnx_ir.Model, name: str, read: ParameterRead, bias: Tensor) -> None:
    """Beside the op that reads the weight where that takes a bias, else behind it."""
    op = read.use.op
    y, weight = op.outputs[0], op.inputs[read.use.position]
    dtype = next((one.dtype for one in (y, weight, *op.inputs) if one is not None and one.dtype is not None), None)
    own = _initializer(ir, model, name, _tensor(ir, bias, dtype or ir.DataType.FLOAT, name))
    if op.op_type in OPTIONAL_BIAS:
        op.resize_inputs(3)
        op.replace_input_with(2, own)
        if op.op_type == "Gemm" and "beta" in op.attributes:
            op.attributes.pop("beta")
        return
    total = ir.node("Add", [y, own], name=f"{op.name or name}_bias")
    assert op.graph is not None
    op.graph.insert_after(op, total)
    out = total.outputs[0]
    out.shape, out.type = y.shape, y.type
    is_output = y.is_graph_output()
    y.replace_all_uses_with(out, replace_graph_outputs=True)
    total.replace_input_with(0, y)
    if is_output:
        y.name, out.name = f"{y.name}_without_bias", y.name


def _initializer(ir: Any, model: onnx_ir.Model, name: str, tensor: Any) -> onnx_ir.Value:
    """A constant of the main graph under a name that nothing has yet."""
    graphs = [model.graph, *model.graph.subgraphs()]
    taken = {value.name for graph in graphs for node in graph for value in node.outputs}
    taken |= {name for graph in graphs for name in graph.initializers}
    taken |= {value.name for graph in graphs for value in graph.inputs}
    while name in taken:
        name += "_"
    value: onnx_ir.Value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers[name] = value
    return value


def _tensor(ir: Any, numbers: Tensor, dtype: Any, parameter: str, name: str | None = None) -> Any:
    """Numbers of a parameter in a dtype of ONNX, rounded once.

    Raises: MergeError where that dtype can't hold them.
    """
    wide = numbers.detach().cpu().contiguous()
    if dtype.name == "BFLOAT16":
        narrow = wide.to(torch.bfloat16)
        finite = bool(narrow.isfinite().all())
        array: np.ndarray = narrow.view(torch.int16).numpy().view(dtype.numpy())
    else:
        wide = wide.float() if wide.dtype == torch.bfloat16 else wide
        with np.errstate(over="ignore"):  # it is refused below
            array = wide.numpy().astype(dtype.numpy())
        finite = bool(np.isfinite(array).all())
    if not finite:
        largest = wide.double().abs().max().item()
        raise MergeError(
            f"{parameter!r}: a trained value of size {largest:.4g} does not fit {dtype.name.lower()}, in which the "
            "file has it: fold into a file in bfloat16 or float32"
        )
    return ir.Tensor(array, dtype=dtype, name=name or parameter)
