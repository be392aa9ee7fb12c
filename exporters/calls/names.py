"""Names of the inputs and outputs of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from onelora_compile.errors import ConfigError, ExportError, require
from onelora_compile.printable import shortened

if TYPE_CHECKING:
    import onnx_ir

Names = Sequence[str] | Mapping[str, str] | None


def chosen_names(what: str, own: Sequence[str], asked: Names, taken: Mapping[str, str]) -> list[str]:
    """The names that were asked for, or the model's own.

    Args:
        what: "input" or "output", for messages.
        own: names by the model. One that is taken gets `input.` or `output.` before it.
        asked: a name for each, or a mapping that renames some.
        taken: names that others have, and who.

    Raises:
        ConfigError: another number of names, an unknown one, one twice, one that is taken.
    """
    free: list[str] = []
    for name in (one if one.strip() else what for one in own):  # a key of a dict may be blank, a name may not
        while name in taken or name in free:
            name = f"{what}.{name}"
        free.append(name)
    if asked is None:
        return free
    names = _asked(what, free, asked)
    if wrong := [name for name in names if not isinstance(name, str) or not name.strip()]:
        raise ConfigError(f"{what}_names holds {wrong[0]!r}, which is no name")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{what}_names gives {shortened(twice)} to more than one {what}")
    if clash := [name for name in names if name in taken]:
        raise ConfigError(f"{what}_names: {clash[0]!r} is the name of {taken[clash[0]]} already; choose another")
    return names


def _asked(what: str, own: Sequence[str], asked: Sequence[str] | Mapping[str, str]) -> list[str]:
    if isinstance(asked, str):
        asked = [asked]
    if isinstance(asked, Mapping):
        if unknown := sorted(map(str, set(asked) - set(own))):
            raise ConfigError(f"{what}_names renames {shortened(unknown)}; the {what}s are {', '.join(own)}")
        return [asked.get(name, name) for name in own]
    names = list(asked)
    if len(names) != len(own):
        raise ConfigError(
            f"{what}_names has {len(names)} names; the model has {len(own)} {what}s: {', '.join(own)}. "
            f"To rename some of them: {what}_names={{{own[0] if own else what!r}: ...}}"
        )
    return names


def name_graph(model: onnx_ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the inputs and outputs of a graph their names, in place; nothing else keeps one of them.

    An output that is an input unchanged, a constant, or another output again becomes a copy of it (Identity): a value
    has one name alone.

    Args:
        model: whose graph has these inputs and outputs, in order.
        inputs: names of the inputs; vectors and ids may follow them in the graph.
        outputs: names of the outputs, none of them an input's.

    Raises:
        ExportError: torch.onnx wrote another number of outputs.
    """
    graph = model.graph
    if len(graph.outputs) != len(outputs):
        raise ExportError(
            f"torch.onnx wrote {len(graph.outputs)} of the {len(outputs)} outputs {list(outputs)}: it made None of a "
            "tensor, as of the tangent of torch.autograd.forward_ad (torch.func.jvp is written). Leave that output out"
        )
    for index, value in enumerate(graph.outputs):
        if value.producer() is None or value in list(graph.outputs)[:index]:
            graph.outputs[index] = _copied(graph, value)
    _release(graph, {*inputs, *outputs})
    for value, name in zip([*graph.inputs[: len(inputs)], *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name


def _copied(graph: onnx_ir.Graph, value: onnx_ir.Value) -> onnx_ir.Value:
    node = require("onnx_ir", "onnx", "export to ONNX").node("Identity", [value])
    copy: onnx_ir.Value = node.outputs[0]
    copy.shape, copy.type = value.shape, value.type
    graph.append(node)
    return copy


def _release(graph: onnx_ir.Graph, names: set[str]) -> None:
    """Take names away from the values that have them."""
    nodes = list(graph.all_nodes())
    bodies = [one for node in nodes for attribute in node.attributes.values() for one in _graphs(attribute)]
    held = [value for one in (graph, *bodies) for value in (*one.inputs, *one.initializers.values())]
    held += [value for node in nodes for value in node.outputs]
    used = {value.name for value in held} | names
    for value in held:
        if value.name in names:
            number = 1
            while (free := f"{value.name}_{number}") in used:
                number += 1
            used.add(free)
            value.name = free


def _graphs(attribute: onnx_ir.Attr) -> list[onnx_ir.Graph]:
    """The bodies of If, Loop and Scan."""
    kind = attribute.type.name
    return [attribute.as_graph()] if kind == "GRAPH" else list(attribute.as_graphs()) if kind == "GRAPHS" else []
