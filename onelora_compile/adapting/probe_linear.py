"""What a module does, where its class does not tell: a forward of its own, a weight that is packed or computed.

A subclass of `nn.Linear` is a linear by its weight if it computes W x + c for whatever numbers are in its weight; else
only its output can be adapted, and nothing can be merged.  A module with `in_features` and `out_features` is a linear
if it behaves like one.  Its effect on a few vectors tells, how it stores its weight, and the fingerprint of that
weight.  A call leaves no trace (`twin`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from onelora_compile.adapting.in_training import WithoutDropout, minds_training
from onelora_compile.adapting.module_effect import copied, effect, random_like, without_vector
from onelora_compile.kinds import is_conv1d, is_linear, is_plain
from onelora_compile.looking.twin import no_trace, twin_of

_ROWS = 8
# int4 kernels that quantise their input too are off by some per cent; a wrong guess is off by its whole size.
_AFFINE = 0.1
_SAME = 1e-3
_ROUGH = 0.05  # of numbers with eight bits
# Shapes of rows, factors and dtypes (None: the module's own) of inputs on which a linear is the same map.
_INPUTS: tuple[tuple[tuple[int, ...], float, torch.dtype | None], ...] = (
    *(((8,), size, None) for size in (1e-4, 1e4)),
    *((shape, 1.0, None) for shape in ((), (1, 1), (1, 8), (8, 1), (2, 4), (4, 2), (2, 2, 2), (1, 2, 2, 2))),
    ((8,), 1.0, torch.bfloat16),
)
_PACKED = "LinearPackedParams"  # of torch.ao.nn.quantized and torch.ao.nn.sparse.quantized

# Moved axes fit by chance where sizes are equal, which no probe covers; where the weight is read it is right anyway.
_MOVING = {"permute", "movedim", "moveaxis", "swapaxes", "swapdims", "rearrange"}
MOVES = "its forward moves axes ({}), so which of them are inputs can't be told from its output"
OTHER_OUTPUT = "it has the sizes of a linear, but returns {found} for {given}"
TRAINS = "in training it computes something else than W x + c, which its output can't tell"


def weight_axes(module: nn.Module) -> tuple[tuple[int, ...] | None, str]:
    """The input axes of the `weight` of a subclass of `nn.Linear`, or of Conv1D.

    Returns:
        The axes where a call computes W x + c; none where the weight is packed, so that only its effect is known;
        None where a call computes something else, or the weight something else than the parameter `weight`: there
        its output can be adapted, but no weight; and "", or why not even that: then its weight may be read adapted.
    """
    usual = (0,) if is_conv1d(module) else (1,)
    if _is_unchanged(module):
        return usual, ""
    weight = module._parameters.get("weight")
    if weight is None or not is_plain(weight):
        packed = weight is not None or not _computes_weight(module)
        return (usual if weight is not None else ()) if packed else None, ""
    if moving := sorted(_MOVING.intersection(getattr(getattr(type(module).forward, "__code__", None), "co_names", ()))):
        return None, MOVES.format(", ".join(moving))
    with no_trace(module):
        return _axes_of(module, usual)


def _is_unchanged(module: nn.Module) -> bool:
    """Whether the module computes with its parameter `weight` what its library's class does."""
    kind = type(module)
    base = next(c for c in kind.__mro__ if c is nn.Linear or (c.__name__, c.__module__) == _CONV1D)
    names = ("forward", "weight", "bias", "__call__", "__getattr__", "__getattribute__")
    changed = any(name in vars(c) for c in kind.__mro__[: kind.__mro__.index(base)] for name in names)
    known = base.forward is _FORWARD if base is nn.Linear else True
    return known and not changed and "weight" in module._parameters and "weight" not in vars(module)


_CONV1D = ("Conv1D", "transformers.pytorch_utils")
_FORWARD = nn.Linear.forward


def _computes_weight(module: nn.Module) -> bool:
    """Whether its `weight` is a plain tensor that is made of others: a property, a parametrization, weight_norm."""
    with no_trace(module):
        try:
            value = getattr(twin_of(module, copied), "weight", None)
        except Exception:  # of the user's property
            return True
    return isinstance(value, Tensor) and is_plain(value)


def _axes_of(module: nn.Module, usual: tuple[int, ...]) -> tuple[tuple[int, ...] | None, str]:
    """As `weight_axes`, by what a call does with two weights: f(x; W) - f(x; V) = (W - V) x is what merging needs."""
    try:
        twin = twin_of(module, random_like)
        weight: Any = twin._parameters["weight"]
        x, y = _first_call(twin, weight, usual)
    except Exception as error:  # code that nobody knows, on numbers that it may not take
        return None, _why_no_call(module, error)
    if not isinstance(y, Tensor):
        return None, OTHER_OUTPUT.format(found=_shape(y), given=_shape(x))
    inputs = [x, *_inputs(x)]
    outputs = [y, *_calls(twin, inputs[1:])]
    for given, found in zip(inputs, outputs, strict=True):  # pooling and the choice of a token go by the rank
        if found is not None and (not isinstance(found, Tensor) or found.shape[:-1] != given.shape[:-1]):
            return None, OTHER_OUTPUT.format(found=_shape(found), given=_shape(given))
    try:
        if (axes := _moved_axes(twin, inputs, outputs)) is not None and not _minds_more(twin, x):
            return (axes, "") if not minds_training(module) or _trains_as(twin, inputs, axes) else (None, TRAINS)
    except Exception:  # as above
        pass
    right = y.shape[-1] == getattr(module, "out_features", y.shape[-1])
    return None, "" if right else OTHER_OUTPUT.format(found=_shape(y), given=_shape(x))


def still_affine(module: nn.Module, axes: Sequence[int]) -> bool:
    """Whether a linear that is adapted by its weight computes W x + c now: its code may go by what was set since."""
    kind: Any = getattr(module, "_onelora_base", type(module))
    if kind.forward is _FORWARD:
        return True
    plain = without_vector(module)
    if is_linear(plain) and _is_unchanged(plain):
        return True
    with no_trace(plain):
        return _axes_of(plain, (0,) if is_conv1d(plain) else (1,))[0] == tuple(axes)


def _trains_as(twin: nn.Module, inputs: Sequence[Tensor], axes: tuple[int, ...]) -> bool:
    """Whether a call in training, dropout aside, is W x + c too."""
    twin.train()
    try:
        with WithoutDropout(), torch.enable_grad():
            return _moved_axes(twin, inputs, _calls(twin, inputs)) == axes
    except Exception:  # as in evaluation; a module may return more in training
        return False


def _inputs(x: Tensor) -> Iterator[Tensor]:
    """Inputs of other ranks, sizes and dtypes, made of the rows of x."""
    for shape, size, dtype in _INPUTS:
        rows = x.flatten(0, -2)[: prod(shape)]
        if len(rows) == prod(shape):
            yield (rows * size).reshape(*shape, -1).to(dtype or x.dtype)


def _calls(twin: nn.Module, inputs: Sequence[Tensor]) -> list[Any]:
    """What a module, in the dtype of each input, makes of it; None of what it refuses, which can't be wrong."""
    weight: Any = twin._parameters["weight"]
    twins, found = {weight.dtype: twin}, []
    for given in inputs:
        if given.dtype not in twins:
            twins[given.dtype] = copy.deepcopy(twin).to(given.dtype)
        try:
            found.append(twins[given.dtype].forward(given))
        except Exception:  # of code that nobody knows
            found.append(None)
    return found


def _moved_axes(twin: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Any]) -> tuple[int, ...] | None:
    """The input axes of the weight if another weight, which it is given, changes each output by what W x changes.

    Another map for inputs of another rank, size or dtype is one that clamps, or goes by the dtype.
    """
    weight: Any = twin._parameters["weight"]
    before = weight.detach().clone()
    weight.copy_(before.flip(0) * 0.5)
    others, change = _calls(twin, inputs), before - weight
    weight.copy_(before)
    if others[0] is None:
        return None
    taken = [one for one in zip(inputs, outputs, others, strict=True) if one[1] is not None and one[2] is not None]
    for axes, w in (((1,), change.T), ((0,), change)):
        if all(_moved_by(w, *one) for one in taken):
            return axes
    return None


def _moved_by(w: Tensor, x: Tensor, y: Tensor, other: Tensor) -> bool:
    """Whether the outputs of two weights, whose difference is wᵀ, differ by x w."""
    tolerance = _SAME if x.dtype == w.dtype else _ROUGH
    fits = w.shape == (x.shape[-1], y.shape[-1])
    return fits and _close(y.double() - other.double(), (x.to(w.dtype) @ w).double(), tolerance)


def _why_no_call(module: nn.Module, error: Exception) -> str:
    """Why a module that can't be called with other numbers can't even be adapted by its output; "" if it can."""
    rest = list(inspect.signature(module.forward).parameters.values())[1:]
    if any(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in rest):
        return ""  # it needs more than an input
    x = torch.randn(_ROWS, _size(module, "in_features"), generator=torch.Generator().manual_seed(0), device="cpu")
    try:
        y = effect(module, x)
    except Exception:
        return f"it has the sizes of a linear, but a call with one tensor failed: {_sentence(error)}"
    right = y.shape == (_ROWS, _size(module, "out_features"))
    return "" if right else OTHER_OUTPUT.format(found=_shape(y), given=_shape(x))


def _size(module: nn.Module, name: str) -> int:
    value = getattr(module, name, None) or getattr(module, {"in_features": "nx", "out_features": "nf"}[name])
    assert isinstance(value, int)
    return value


def _first_call(twin: nn.Module, weight: Tensor, usual: tuple[int, ...]) -> tuple[Tensor, Any]:
    """The first input of a few shapes that the module takes, and what it returns."""
    failed: Exception | None = None
    rows, columns = weight.shape if usual == (1,) else weight.shape[::-1]
    count, own = _count(columns, rows), getattr(twin, "in_features", columns)
    for shape in dict.fromkeys(((count, own), (2, count, own), (count, rows))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu")
        x = x.to(weight.device, weight.dtype)
        try:
            return x, twin.forward(x)
        except Exception as error:  # as above
            failed = failed or error
    assert failed is not None
    raise failed


def _count(*taken: int) -> int:
    """A number of rows that is no size of the weight: a module that transposes its input must fail."""
    return next(count for count in range(_ROWS, _ROWS + 3) if count not in taken)


def _minds_more(twin: nn.Module, x: Tensor) -> bool:
    """Whether the output depends on an argument besides the input, as far as other values of it can be found."""
    y = twin.forward(x)
    for name, parameter in list(inspect.signature(twin.forward).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = parameter.default
        if isinstance(default, bool):
            other: Any = not default
        elif isinstance(default, (int, float)):
            other = 2 * default + 1
        elif default is None:
            other = 0.5
        else:
            return True
        found = twin.forward(x, **{name: other})
        if not isinstance(found, Tensor) or found.shape != y.shape or not _close(found.double(), y.double(), _SAME):
            return True
    return False


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _sentence(error: Exception) -> str:
    """The first sentence of an error; PyTorch goes on with a page of backends where an operator is missing."""
    return str(error).partition("\n")[0].partition(". ")[0]


def linear_like(module: nn.Module) -> tuple[tuple[int, ...] | None, str]:
    """Whether a module that is no `nn.Linear` behaves like a linear.

    Returns:
        As `weight_axes`.
    """
    in_features, out_features = module.in_features, module.out_features
    assert isinstance(in_features, int)
    assert isinstance(out_features, int)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, in_features, generator=generator, device="cpu")
    # f(Σ a x) = Σ a f(x) for weights a that add up to 1: what an affine map does, and little else.
    mix = torch.randn(_ROWS, _ROWS, generator=generator, device="cpu")
    mix = mix / mix.sum(-1, keepdim=True).clamp(min=0.5)
    mix[:, 0] += 1 - mix.sum(-1)
    try:
        y, mixed = effect(module, x), effect(module, mix @ x)
    except Exception as error:  # a module of an unknown class may raise anything
        return None, f"it has in_features and out_features, but a call with one tensor failed: {_sentence(error)}"
    if y.shape != (_ROWS, out_features):
        return None, f"it has in_features and out_features, but returns {list(y.shape)} for {list(x.shape)}"
    if not _close(mixed, mix.double() @ y, _AFFINE):
        return None, "it has in_features and out_features, but its output is not linear in its input"
    weight = module._parameters.get("weight")
    if weight is None or not is_plain(weight) or weight.ndim != 2:
        return (), ""
    with no_trace(module):
        return _axes_of(module, (1,))


def may_be_linear(module: nn.Module) -> bool:
    """Whether `linear_like` should be asked: sizes of a linear on a module of another class, without children.

    What torch.ao quantises keeps its weight in a child.
    """
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    named = all(isinstance(size, int) and size > 0 for size in sizes)
    return named and not is_linear(module) and all(type(child).__name__ == _PACKED for child in module.children())


def _close(actual: Tensor, expected: Tensor, relative: float) -> bool:
    return bool((actual - expected).norm() <= relative * expected.norm().clamp(min=1e-30))
