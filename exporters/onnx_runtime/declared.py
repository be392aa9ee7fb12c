"""Given arrays, held against the inputs that a model declares: ONNX Runtime names what it refuses, not what helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ConfigError, OneLoRAError

if TYPE_CHECKING:
    import onnx_ir
    import onnxruntime

Slot = tuple[np.dtype[Any] | None, Sequence[Any] | None]  # dtype and sizes, None where they are not known
_NAMES = {"float": "float32", "double": "float64"}


def slots_of_model(model: onnx_ir.Model) -> dict[str, Slot]:
    """The inputs of a model by name."""
    return {
        str(one.name): (
            _known(one.dtype.numpy()) if one.dtype is not None else None,
            [size if isinstance(size, int) else str(size) for size in one.shape] if one.shape is not None else None,
        )
        for one in model.graph.inputs
    }


def slots_of_session(session: onnxruntime.InferenceSession) -> dict[str, Slot]:
    """The inputs of a session by name."""
    found: dict[str, Slot] = {}
    for one in session.get_inputs():
        name = one.type.removeprefix("tensor(").removesuffix(")")
        try:
            dtype = _known(np.dtype(_NAMES.get(name, name)))
        except TypeError:  # NumPy has no such numbers
            dtype = None
        found[one.name] = dtype, one.shape if one.type.startswith("tensor(") else None
    return found


def fitted(
    feed: Mapping[str, Any], slots: Mapping[str, Slot], raised: type[OneLoRAError] = ConfigError
) -> dict[str, np.ndarray]:
    """The arrays in the dtypes that the model takes, where that changes no number.

    Integers that fit, narrower floats, and numbers and lists of Python are converted; other arrays are not.

    Raises:
        raised: an array of another dtype, rank or size; it names the input, what was found and what to give.
    """
    return {name: _fitted(name, given, *slots.get(name, (None, None)), raised) for name, given in feed.items()}


def _fitted(
    name: str, given: Any, dtype: np.dtype[Any] | None, shape: Sequence[Any] | None, raised: type[OneLoRAError]
) -> np.ndarray:
    try:
        value = np.asarray(given)
    except ValueError as error:
        raise raised(f"input {name!r} is no array: {error}") from None
    if shape is not None and not _same(value.shape, shape):
        remedy = f"give {len(shape)} axes of these sizes, where a name stands for any size"
    elif dtype is None or value.dtype == dtype:
        return value
    elif (found := _converted(value, dtype, isinstance(given, int | float | list | tuple))) is not None:
        return found
    else:
        remedy = f"convert it, as with .astype('{dtype}')"
    kind = dtype or "an array"
    raise raised(f"input {name!r} takes {kind} {_text(shape)}; given was {value.dtype} {list(value.shape)}: {remedy}")


def _converted(value: np.ndarray, dtype: np.dtype[Any], plain: bool) -> np.ndarray | None:
    kinds = value.dtype.kind, dtype.kind
    if np.can_cast(value.dtype, dtype, "safe") and (kinds[0] == kinds[1] or plain):
        return value.astype(dtype)
    if plain and kinds[0] in "iuf" and kinds[1] == "f":
        return value.astype(dtype)
    if kinds[0] in "iu" and kinds[1] in "iu":
        ends = np.iinfo(dtype)
        fits = not value.size or (int(value.min()) >= ends.min and int(value.max()) <= ends.max)
        return value.astype(dtype) if fits else None
    return None


def _same(found: Sequence[int], shape: Sequence[Any]) -> bool:
    return len(found) == len(shape) and all(
        not isinstance(size, int) or size < 0 or size == one for one, size in zip(found, shape, strict=True)
    )


def _known(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    return dtype if dtype.kind in "biuf" else None


def _text(shape: Sequence[Any] | None) -> str:
    return "[" + ", ".join(map(str, shape)) + "]" if shape is not None else "of any shape"
