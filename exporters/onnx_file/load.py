"""Read an ONNX model that may come from anywhere: checked before a tool works on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onelora_compile.errors import ExportError, require
from onelora_compile.file_names import check_there

if TYPE_CHECKING:
    import onnx_ir


_PART = 1 << 20  # bytes
_FILES = "onelora.files"


def load_model(path: Path) -> onnx_ir.Model:
    """The model at a path; external data stays in its files until it is read.

    Raises:
        ExportError: a pipe, not an ONNX model, a damaged one, or external data that is missing, too short, or
            outside the model's folder.
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
    """
    ir: Any = require("onnx_ir", "onnx", "read an ONNX model")
    check_there(path)
    if not path.is_file():
        raise ExportError(f"{path} is a device, a pipe or a socket; a model is read more than once: give a file")
    try:
        model: onnx_ir.Model = _loaded(ir, path)
        model.meta[_FILES] = files_named(model, path)
        graphs = [model.graph, *model.graph.subgraphs()]
        for value in (value for graph in graphs for value in graph.initializers.values()):
            _check(value.const_value, path)
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _linked(ir, value.const_value, path)
        for node in nodes_of(model):
            for name, held in list(node.attributes.items()):
                if any(isinstance(one, ir.ExternalTensor) for one in _tensors_in(held)):
                    node.attributes[name] = _embedded(ir, held, path)
    except (ExportError, FileNotFoundError):
        raise
    except (Exception, RecursionError) as error:  # protobuf and onnx_ir raise many kinds for a damaged file
        raise ExportError(f"{path} is not an ONNX model, or is damaged: {error}") from error
    if not any(True for _ in model.graph):
        raise ExportError(f"{path} holds no graph: it is not an ONNX model, or is damaged")
    return model


def files_of(model: onnx_ir.Model) -> list[Path]:
    """The files beside a loaded model that it was read from: of weights, in initializers and in attributes."""
    return list(model.meta.get(_FILES, ()))


def files_named(model: onnx_ir.Model, path: Path) -> list[Path]:
    """The files of weights that a model at a path names."""
    graphs = [model.graph, *model.graph.subgraphs()]
    held: list[Any] = [value.const_value for graph in graphs for value in graph.initializers.values()]
    held += [
        one for node in nodes_of(model) for attribute in node.attributes.values() for one in _tensors_in(attribute)
    ]
    return [path.parent / name for name in sorted({str(one.location) for one in held if hasattr(one, "location")})]


def nodes_of(model: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    """The nodes of all graphs of a model and of its functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _tensors_in(attribute: Any) -> list[Any]:
    if attribute.is_ref() or attribute.value is None:
        return []
    if attribute.type.name == "TENSOR":
        return [attribute.value]
    return list(attribute.value) if attribute.type.name == "TENSORS" else []


def _embedded(ir: Any, attribute: Any, path: Path) -> Any:
    """An attribute with its numbers in it, which nothing would keep together with their file."""
    tensors = [_in_memory(ir, tensor, path) for tensor in _tensors_in(attribute)]
    one = attribute.type.name == "TENSOR"
    return ir.AttrTensor(attribute.name, tensors[0]) if one else ir.AttrTensors(attribute.name, tensors)


def _in_memory(ir: Any, tensor: Any, path: Path) -> Any:
    _check(tensor, path)
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    tensor.base_dir = str(path.parent)
    return ir.tensor(read_tensor(_linked(ir, tensor, path)), dtype=tensor.dtype, name=tensor.name)


def read_tensor(tensor: Any) -> np.ndarray:
    """The numbers of a tensor in memory of their own, which may be written to.

    External data is read, not mapped: the pages of a map count as the process's memory for as long as it is open.
    """
    if not hasattr(tensor, "location"):
        return np.array(tensor.numpy())
    dtype = tensor.dtype.numpy()
    if tensor.dtype.bitwidth % 8:  # several numbers in a byte
        numbers = np.array(tensor.numpy())
        tensor.release()
        return numbers
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        return np.fromfile(file, dtype, tensor.size).reshape(tuple(tensor.shape))


def by_rows(tensor: Any, shape: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """The numbers of a matrix, some rows at a time, each part with the number of its first row.

    Parts may be written to, and are small enough to stay in a processor's cache until they are overwritten by the next.

    Raises:
        ExportError: the file ends before the tensor does.
    """
    rows, columns = shape
    dtype = tensor.dtype.numpy()
    step = max(1, _PART // max(1, columns * dtype.itemsize))
    buffer = np.empty((min(step, rows), columns), dtype)
    if not hasattr(tensor, "location") or tensor.dtype.bitwidth % 8:
        numbers = tensor.numpy().reshape(shape)
        for start in range(0, rows, step):
            part = buffer[: min(step, rows - start)]
            part[:] = numbers[start : start + step]
            yield start, part
        return
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.offset or 0)
        for start in range(0, rows, step):
            part = buffer[: min(step, rows - start)]
            _fill(file, part, tensor)
            yield start, part


def _fill(file: Any, part: np.ndarray, tensor: Any) -> None:
    rest = part.reshape(-1).view(np.uint8).data
    while len(rest):
        count = file.readinto(rest)
        if not count:
            raise ExportError(f"{tensor.path} ends within {tensor.name!r}: the file is damaged")
        rest = rest[count:]


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor of the array's memory; numpy itself has no bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _loaded(ir: Any, path: Path) -> Any:
    """The model with its sparse tensors made dense: onnx_ir drops initializers and can't read constants."""
    onnx: Any = require("onnx", "onnx", "read an ONNX model")
    proto = onnx.load(path, load_external_data=False)
    graphs = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        if hasattr(graph, "sparse_initializer"):
            graph.initializer.extend(_dense(onnx, sparse, str(path.parent)) for sparse in graph.sparse_initializer)
            del graph.sparse_initializer[:]
        for held in (held for node in graph.node for held in node.attribute):
            graphs += [held.g] if held.HasField("g") else [*held.graphs]
            if held.name == "sparse_value" and held.HasField("sparse_tensor"):  # of a Constant
                dense = _dense(onnx, held.sparse_tensor, str(path.parent))
                held.CopyFrom(onnx.helper.make_attribute("value", dense))
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, str(path.parent))
    return model


def _dense(onnx: Any, sparse: Any, folder: str) -> Any:
    """A sparse tensor as a dense one; its places are numbers of entries [n], or coordinates [n, rank]."""
    values, places = (onnx.numpy_helper.to_array(one, folder) for one in (sparse.values, sparse.indices))
    full = np.zeros(tuple(sparse.dims), values.dtype)
    full[tuple(places.T) if places.ndim == 2 else np.unravel_index(places, full.shape)] = values
    return onnx.numpy_helper.from_array(full, sparse.values.name)


def _check(tensor: Any, path: Path) -> None:
    """Whether a tensor has the bytes that its shape needs, where it says."""
    if tensor is None:
        return
    if tensor.dtype.name == "STRING":
        return
    if not hasattr(tensor, "location"):
        # Embedded numbers: reading them is what tells a wrong length.
        raw = len(tensor.tobytes()) if tensor.size <= 64 else None
        if raw is not None and raw != tensor.nbytes:
            raise ExportError(f"{path}: initializer {tensor.name!r} has {raw} bytes; its shape needs {tensor.nbytes}")
        return
    location = Path(str(tensor.location))
    file = path.parent / location
    if location.is_absolute() or ".." in location.parts:
        raise ExportError(
            f"{path}: initializer {tensor.name!r} points to {str(location)!r}, outside the folder of the model; refused"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{path}: the file {file} with its weights is missing")
    if not any((real := file.resolve()).is_relative_to(folder) for folder in _folders(path)):
        raise ExportError(
            f"{path}: initializer {tensor.name!r} points to the link {file}, which leads to {real}, outside the folder "
            "of the model, where ONNX Runtime reads no weights: put the file itself there"
        )
    offset, length = int(tensor.offset or 0), int(tensor.length or tensor.nbytes)
    if offset < 0 or length != tensor.nbytes or offset + length > file.stat().st_size:
        raise ExportError(
            f"{path}: initializer {tensor.name!r} needs {tensor.nbytes} bytes at {offset} of {file}, which has "
            f"{file.stat().st_size}: the file is damaged, or of another model"
        )


def _folders(path: Path) -> tuple[Path, Path]:
    """Where ONNX Runtime looks for weights: beside the model, and beside what it is a link to."""
    return path.parent.resolve(), path.resolve().parent


def _linked(ir: Any, tensor: Any, path: Path) -> Any:
    """The tensor; by its whole path where onnx_ir would refuse a link that ONNX Runtime follows.

    A cache of Hugging Face's hub holds a model and its weights as links to another folder; copies may be hard links.
    """
    file = path.parent.absolute() / str(tensor.location)
    if file.resolve().is_relative_to(path.parent.resolve()) and file.stat().st_nlink == 1:
        return tensor
    return ir.ExternalTensor(
        str(file), tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
    )
