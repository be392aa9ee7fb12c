"""The equation of an einsum, however it is spelled, and a letter for each axis of its operands."""

from __future__ import annotations

import string
from typing import Any

from torch import fx

Labels = tuple[str, str, str]  # one letter for each axis of x, W and the output


def einsum_operands(node: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """The equation, with an output, and the operands, of either spelling of an einsum; None for neither."""
    first, *rest = node.args
    if isinstance(first, str):
        equation = first.replace(" ", "")
        parts = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        parts = parts or list(node.kwargs.get("tensors", node.kwargs.get("operands", ())))  # type: ignore[arg-type]
    else:  # einsum(x, [0, 1], w, [2, 1], [0, 2])
        parts, sublists = list(node.args[::2]), list(node.args[1::2])
        if len(node.args) % 2:
            sublists.append(parts.pop())
        terms = [_letters_of(one) for one in sublists]
        if None in terms or not len(parts) <= len(terms) <= len(parts) + 1:
            return None
        equation = ",".join(terms[: len(parts)]) + "".join("->" + term for term in terms[len(parts) :])  # type: ignore
    if not parts or not all(isinstance(part, fx.Node) for part in parts):
        return None
    return equation if "->" in equation else _with_output(equation), parts  # type: ignore[return-value]


def _letters_of(sublist: Any) -> str | None:
    if not isinstance(sublist, (list, tuple)):
        return None
    return "".join("..." if one is Ellipsis else string.ascii_letters[one] for one in sublist)


def _with_output(equation: str) -> str:
    """The output that einsum takes where none is written: what occurs once, in the order of the alphabet."""
    letters = sorted(letter for letter in set(equation) if letter.isalpha() and equation.count(letter) == 1)
    return f"{equation}->{'...' if '...' in equation else ''}{''.join(letters)}"


def einsum_labels(equation: str, weight_first: bool, rank_x: int | None, rank_w: int | None) -> Labels | None:
    """The labels of x, W and the output with a letter for each axis under an ellipsis; unknown ranks have none."""
    left, _, of_y = equation.partition("->")
    of_x, of_weight = reversed(left.split(",")) if weight_first else left.split(",")
    under_x, under_w = _under(of_x, rank_x), _under(of_weight, rank_w)
    if "..." in of_weight and rank_w is None:
        return None
    if "..." not in of_y and (under_x or under_w):
        return None  # summed over without a name
    free = [letter for letter in string.ascii_letters if letter not in equation]
    letters = "".join(free[: max(under_x, under_w)])
    spread = [letters[len(letters) - count :] for count in (under_x, under_w, len(letters))]
    return tuple(one.replace("...", axes) for one, axes in zip((of_x, of_weight, of_y), spread, strict=True))  # type: ignore


def _under(term: str, rank: int | None) -> int:
    return rank - len(term.replace("...", "")) if "..." in term and rank is not None else 0
