"""Everything that a model holds, as a list of plain values to compare; written apart from the room `looking`."""

import hashlib
import random
import types

import numpy
import torch

FLAT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)


def snapshot(*roots):
    """Lines `path: value` of all that the roots hold, with the default random states."""
    lines: list[str] = []
    seen: dict[int, tuple[str, object]] = {}
    left = [(f"root{i}", root) for i, root in enumerate(roots)]
    while left:
        path, value = left.pop()
        if isinstance(value, FLAT):
            lines.append(f"{path}: {value!r}")
        elif id(value) in seen:
            lines.append(f"{path}: as {seen[id(value)][0]}")
        else:
            seen[id(value)] = (path, value)
            lines.append(f"{path}: {type(value).__name__}{_own(value)}")
            left += [(f"{path}.{name}", part) for name, part in _parts(value)]
    states = [random.getstate(), numpy.random.get_state(legacy=False), torch.get_rng_state().tolist()]
    return [*lines, *(hashlib.sha1(repr(state).encode()).hexdigest() for state in states)]


def _own(value):
    if isinstance(value, torch.Tensor):
        kept = value.detach().cpu()
        numbers = (
            None if kept.is_meta else hashlib.sha1(kept.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        )
        return f"{list(kept.shape)} {kept.dtype} {value.requires_grad} {numbers and numbers.hexdigest()}"
    if isinstance(value, (numpy.ndarray, torch.Generator, random.Random)):
        state = getattr(value, next(one for one in ("getstate", "get_state", "tolist") if hasattr(value, one)))()
        return str(state.tolist() if isinstance(state, torch.Tensor) else state)
    if isinstance(value, numpy.random.Generator):
        return str(value.bit_generator.state)
    return f" {sorted(map(repr, value))}" if isinstance(value, (set, frozenset)) else ""


def _parts(value):
    if isinstance(value, dict):
        yield from ((f"{i} {key!r}", part) for i, (key, part) in enumerate(value.items()))
    elif isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        yield from enumerate(value)
    elif isinstance(value, types.FunctionType):
        yield from ((f"cell{i}", cell.cell_contents) for i, cell in enumerate(value.__closure__ or ()))
        yield "dict", value.__dict__
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__
    elif isinstance(value, type):
        plain = {k: v for k, v in vars(value).items() if not k.startswith("__") and k != "_abc_impl"}
        if value.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "enum"):
            yield "attributes", plain
        return
    if isinstance(value, torch.Tensor):
        yield from vars(value).items()
    elif not isinstance(value, (types.ModuleType, types.FunctionType)) and hasattr(value, "__dict__"):
        yield "type", type(value)
        yield from vars(value).items()
