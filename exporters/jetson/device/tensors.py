"""Tensors as bytes, and the two file formats that hold them: safetensors and npy.

Neither NumPy nor the safetensors package is needed: both formats are a header and raw little-endian numbers.
"""

from __future__ import annotations

import ast
import json
import math
import struct
from typing import Any, Sequence

SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_CODES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_STRUCT = {"float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int8": "b", "uint8": "B"}
_NPY = {"f8": "float64", "f4": "float32", "f2": "float16", "i8": "int64", "i4": "int32", "i1": "int8", "u1": "uint8"}
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors package


class TensorError(ValueError):
    """A file or a value that is not the tensor that it should be."""


class Tensor:
    """A dense tensor: `dtype` as NumPy names it (and "bfloat16"), `shape`, and its bytes in row-major order."""

    def __init__(self, dtype: str, shape: Sequence[int], data: Any) -> None:
        self.dtype = dtype
        self.shape = tuple(int(size) for size in shape)
        self.data = bytes(data)
        if len(self.data) != self.count * SIZES[dtype]:
            raise TensorError(
                f"{len(self.data)} bytes are no {dtype} {list(self.shape)}, which has {self.count * SIZES[dtype]}"
            )

    @property
    def count(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, value: Any) -> Tensor:
        """A tensor from itself, or from an array of NumPy or of what behaves like it (`dtype`, `shape`, `tobytes`)."""
        if isinstance(value, Tensor):
            return value
        dtype = str(value.dtype)
        if dtype not in SIZES:
            raise TensorError(f"an array of {dtype} can't be given: known are {', '.join(sorted(SIZES))}")
        return cls(dtype, value.shape, value.tobytes())

    @classmethod
    def full(cls, dtype: str, shape: Sequence[int], number: float) -> Tensor:
        """A tensor with one number everywhere."""
        return cls.from_values(dtype, shape, [number] * math.prod(shape))

    @classmethod
    def from_values(cls, dtype: str, shape: Sequence[int], values: Sequence[float]) -> Tensor:
        """A tensor from its entries in row-major order."""
        if dtype == "bool":
            return cls(dtype, shape, bytes(bool(value) for value in values))
        try:
            return cls(dtype, shape, struct.pack(f"<{len(values)}{_STRUCT[dtype]}", *values))
        except (struct.error, OverflowError) as error:
            raise TensorError(f"the values do not fit into {dtype}: {error}") from None

    def values(self) -> list[Any]:
        """The entries in row-major order, as numbers of Python."""
        if self.dtype == "bool":
            return [bool(value) for value in self.data]
        if self.dtype == "bfloat16":  # the upper half of a float32
            wide = b"".join(b"\0\0" + self.data[start : start + 2] for start in range(0, len(self.data), 2))
            return list(struct.unpack(f"<{self.count}f", wide))
        return list(struct.unpack(f"<{self.count}{_STRUCT[self.dtype]}", self.data))

    def to(self, dtype: str) -> Tensor:
        """The same numbers in another dtype.

        Raises:
            TensorError: they do not fit, or would be cut (a float as an integer).
        """
        if dtype == self.dtype:
            return self
        if self.dtype.startswith(("float", "bfloat")) and not dtype.startswith("float"):
            raise TensorError(f"{self.dtype} numbers would be cut to {dtype}")
        return Tensor.from_values(dtype, self.shape, self.values())

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return not self.dtype.startswith(("float", "bfloat")) or all(map(math.isfinite, self.values()))

    def numpy(self) -> Any:
        """As a NumPy array, where NumPy is installed; bfloat16 as its bits."""
        import numpy

        return numpy.frombuffer(self.data, self.dtype.replace("bfloat16", "uint16")).reshape(self.shape).copy()


def read_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file and its metadata, read and checked whole.

    Raises:
        TensorError: not a safetensors file, cut short, or with a header that does not fit its bytes.
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        raw = file.read()
    try:
        (length,) = struct.unpack_from("<Q", raw)
        if length > _LONGEST_HEADER or 8 + length > len(raw):
            raise TensorError(f"its header has {length} bytes, the file {len(raw)}")
        header = json.loads(raw[8 : 8 + length].decode("utf-8"))
        metadata = header.pop("__metadata__", {})
        tensors, end = {}, 0
        body = raw[8 + length :]
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = (int(offset) for offset in entry["data_offsets"])
            if first != end or last < first or last > len(body):
                raise TensorError(f"{name!r} is at {first}..{last} of {len(body)} bytes")
            if entry["dtype"] not in _CODES:
                raise TensorError(f"{name!r} is of dtype {entry['dtype']}")
            tensors[str(name)] = Tensor(_CODES[entry["dtype"]], entry["shape"], body[first:last])
            end = last
        if end != len(body):
            raise TensorError(f"{len(body) - end} bytes belong to no tensor")
        if not isinstance(metadata, dict):
            raise TensorError("its metadata is no table")
        return tensors, {str(key): str(value) for key, value in metadata.items()}
    except TensorError as error:
        raise TensorError(f"{path} is damaged or cut short: {error}") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise TensorError(f"{path} is not a safetensors file, or is damaged: {error!r}") from None


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file."""
    codes = {dtype: code for code, dtype in _CODES.items()}
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(tensor.data)],
        }
        end += len(tensor.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values())


def read_npy(path: str) -> Tensor:
    """A tensor from a .npy file.

    Raises:
        TensorError: not such a file, in column-major order, or of a dtype that models do not take.
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        raw = file.read()
    try:
        if raw[:6] != b"\x93NUMPY":
            raise TensorError("it does not begin as one")
        start = 10 if raw[6] == 1 else 12
        (length,) = struct.unpack_from("<H" if raw[6] == 1 else "<I", raw, 8)
        header = ast.literal_eval(raw[start : start + length].decode("latin1"))
        if header["fortran_order"]:
            raise TensorError("it is in column-major order: save numpy.ascontiguousarray(x)")
        code = header["descr"].lstrip("<|=")
        dtype = "bool" if code == "b1" else _NPY.get(code)
        if dtype is None:
            raise TensorError(f"its dtype is {header['descr']}")
        return Tensor(dtype, header["shape"], raw[start + length :])
    except TensorError as error:
        raise TensorError(f"{path} is not a .npy file for this: {error}") from None
    except (struct.error, ValueError, KeyError, TypeError, SyntaxError, IndexError, AttributeError) as error:
        raise TensorError(f"{path} is not a .npy file, or is damaged: {error!r}") from None


def npy_bytes(tensor: Tensor) -> bytes:
    """The content of a .npy file; bfloat16 becomes float32."""
    if tensor.dtype == "bfloat16":
        tensor = tensor.to("float32")
    code = "|b1" if tensor.dtype == "bool" else "<" + {dtype: code for code, dtype in _NPY.items()}[tensor.dtype]
    header = (
        repr({"descr": code.replace("<i1", "|i1").replace("<u1", "|u1"), "fortran_order": False})[:-1]
        + f", 'shape': {tensor.shape!r}}}"
    )
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + tensor.data


def difference(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """The largest absolute difference of two tensors, and the same over the largest magnitude expected.

    NaN and infinity agree with themselves only.

    Raises:
        TensorError: other shapes.
    """
    if expected.shape != found.shape:
        raise TensorError(f"shape {list(found.shape)}, expected {list(expected.shape)}")
    worst = scale = 0.0
    for want, got in zip(expected.values(), found.values()):
        want, got = float(want), float(got)
        if math.isfinite(want):
            scale = max(scale, abs(want))
        if want == got or (math.isnan(want) and math.isnan(got)):
            continue
        gap = abs(want - got)
        worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst, (worst / scale if scale else worst)
