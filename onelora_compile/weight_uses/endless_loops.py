"""Loops that go by values: followed without values, each answer is the one before, and they never end.

    while x.abs().max() > 1:
        x = F.linear(x, self.w) * 0.1

A place in the code that asks again and again, and between two questions does the same each time, is taken for one.  A
loop over layers asks of each layer, and calls another module in between.
"""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

from torch import fx

from onelora_compile.looking.untouched import of_library

_MOST = 100  # times that a place asks after the same steps; real models ask for fewer than 30 answers in all


class Loops:
    """How often each place of some code asked."""

    def __init__(self, called: str) -> None:
        self._called = called  # key in node.meta: the module whose output a node is
        self._asked: dict[tuple[types.CodeType, int], tuple[fx.Node | None, list[Any], int]] = {}

    def asks(self, graph: fx.Graph) -> None:
        """Note that the code of somebody who is not a library asks for a value.

        Raises:
            TraceError: once too often.
        """
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and of_library(frame.f_globals.get("__name__")):
            frame = frame.f_back
        if frame is None:
            return
        place = frame.f_code, frame.f_lasti
        before, steps, times = self._asked.get(place, (None, [], 0))
        new = [*itertools.takewhile(lambda node: node is not before, reversed(graph.nodes))]
        done = [self._what(node) for node in new]
        times = times + 1 if done == steps else 0
        if times > _MOST:
            raise fx.proxy.TraceError("a loop that depends on values")
        self._asked[place] = (new[0] if new else before, done, times)

    def _what(self, node: fx.Node) -> Any:
        """What a node does, whatever to: its function, or the module that it calls, and the parameters in it."""
        held = [one.target for one in node.all_input_nodes if one.op == "get_attr"]
        return node.target, id(node.meta.get(self._called)), held
