"""Where the code of a model goes by the exact class of a module: `type(layer) is nn.Linear`.

An adapted module is of a subclass, so that such code would take it for something else, without a word.  Told from the
source: a question about the class, or its name, whose answer is compared with, or looked up beside, a class that gets
vectors.  `isinstance` and names in texts are no such question.  What is not seen: names that are put together.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import linecache
import textwrap
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from onelora_compile.weight_uses.reachable_names import Known, reach

_NAMES = ("__name__", "__qualname__")
_EQUAL = (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)
_CONTAINERS = (dict, tuple, list, set, frozenset)


def exact_classes(model: nn.Module, kinds: Collection[type]) -> dict[type, str]:
    """The classes of `kinds` that code in reach of a forward asks for exactly, each with the first place and its line.

    Args:
        model: not changed; its code is not run.
        kinds: classes of modules.
    """
    found: dict[type, str] = {}
    known: Known = {}
    seen: set[types.CodeType] = set()
    for module in model.modules():
        for function in reach(module, known).functions:
            if function.__code__ not in seen and _may_ask(function.__code__):
                seen.add(function.__code__)
                for kind, place in _Source(function, module, kinds).places():
                    found.setdefault(kind, place)
    return found


def _may_ask(code: types.CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return not {"type", "__class__"}.isdisjoint(code.co_names) or any(map(_may_ask, inner))


def _trees(code: types.CodeType) -> list[ast.AST]:
    """The source of some code, with the lines of its file; of a lambda those of its line; none if there is none."""
    with contextlib.suppress(OSError, TypeError, SyntaxError):
        source = textwrap.dedent(inspect.getsource(code))
        with contextlib.suppress(SyntaxError):  # a line of a table that a lambda stands in
            return [ast.increment_lineno(ast.parse(source), code.co_firstlineno - 1)]
        whole = ast.walk(ast.parse("".join(linecache.getlines(code.co_filename))))
        return [node for node in whole if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno]
    return []


class _Source:
    """The source of one function, with what its names stand for."""

    def __init__(self, function: types.FunctionType, owner: nn.Module, kinds: Collection[type]) -> None:
        self._code, self._kinds = function.__code__, kinds
        self._bindings = {**vars(builtins), **function.__globals__, "self": owner}
        for name, cell in zip(self._code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                self._bindings[name] = cell.cell_contents
        self._locals: dict[str, list[ast.expr]] = {}

    def places(self) -> Iterator[tuple[type, str]]:
        """The classes that are asked for exactly, each with where; none where there is no source."""
        nodes = [node for tree in _trees(self._code) for node in ast.walk(tree)]
        for node in nodes:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(value := getattr(node, "value", None), ast.expr):
                for target in (one for one in targets if isinstance(one, ast.Name)):
                    self._locals.setdefault(target.id, []).append(value)
        for node in nodes:
            for question, answers in _questions(node):
                if of := self._asks(question):
                    place = f"{self._code.co_filename}:{question.lineno}: {ast.unparse(node).partition(chr(10))[0]}"
                    yield from ((kind, place) for kind in self._kinds if self._holds(answers, kind, of))

    def _asks(self, node: ast.expr, depth: int = 3) -> str:
        """Whether an expression is the "class" of something, or its "name"; else ""."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type":
            return "class" if len(node.args) == 1 and self._bindings.get("type") is type else ""
        if isinstance(node, ast.Attribute):
            if node.attr in _NAMES and self._asks(node.value, depth) == "class":
                return "name"
            return "class" if node.attr == "__class__" else ""
        own = self._locals.get(node.id, ()) if isinstance(node, ast.Name) and depth else ()
        return next((of for one in own if (of := self._asks(one, depth - 1))), "")

    def _holds(self, node: ast.expr | None, kind: type, of: str, depth: int = 3) -> bool:
        """Whether an expression is a class, or its name, or a container that holds it."""
        if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
            parts: Iterable[ast.expr | None] = node.keys if isinstance(node, ast.Dict) else node.elts
            return any(self._holds(one, kind, of, depth) for one in parts)
        if isinstance(node, ast.Name) and node.id in self._locals:
            return depth > 0 and any(self._holds(one, kind, of, depth - 1) for one in self._locals[node.id])
        value = self._value(node)
        wanted = kind if of == "class" else kind.__name__
        values = list(value) if type(value) in _CONTAINERS else [value]
        return any(type(one) in (type(wanted), type(kind)) and one == wanted for one in values)

    def _value(self, node: ast.expr | None) -> Any:
        """What a constant, a global or an attribute of one is; None where that is not told."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._bindings.get(node.id)
        if isinstance(node, ast.Attribute) and (holder := self._value(node.value)) is not None:
            return inspect.getattr_static(holder, node.attr, None)  # runs no code, imports nothing
        return None


def _questions(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """What may be a question about a class, each with what the answer is compared with, or looked up in."""
    if isinstance(node, ast.Compare):
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            yield left, right
            if isinstance(op, _EQUAL):
                yield right, left
            left = right
    elif isinstance(node, ast.Subscript):
        yield node.slice, node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        yield node.args[0], node.func.value
    elif isinstance(node, ast.Match):
        values = (one.value for case in node.cases for one in ast.walk(case.pattern) if isinstance(one, ast.MatchValue))
        yield from ((node.subject, value) for value in values)
