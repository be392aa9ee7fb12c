"""The base of a model that carries vectors: what `export_onnx` would have written of the model without an adapter.

    load     W + Unsqueeze(b)                        ->   W
    input    y + s * b                               ->   y
    bank     y + s * Gather(table, adapter_ids)      ->   y

Trained heads and norms have no base value in the file: they stay, as constants.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from onelora_compile.errors import ExportError, require
from onelora_compile.exporters.jetson.device.core.modes import IDS
from onelora_compile.exporters.onnx_file.load import read_tensor
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.printable import shortened

if TYPE_CHECKING:
    import onnx_ir


def strip_vectors(model: onnx_ir.Model, metadata: Metadata, path: str) -> None:
    """Take the vectors out of a model, in place; one of mode "base" or "fold" is left as it is.

    Raises:
        ExportError: a bank of heads or norms, whose rows can't be taken out; or vectors, or the ids of a bank, that are
            not where the metadata says.
    """
    if metadata.traits.fixed:
        return
    ir: Any = require("onnx_ir", "onnx", "fold into an ONNX model")
    graph = model.graph
    if metadata.traits.feeds_ids:
        if metadata.trained:
            raise ExportError(
                f"{path} is a bank in which {shortened(metadata.trained)} are rows of tables: nothing can be folded "
                "into it. Fold into an export of the base, or load the adapter into the PyTorch model and export that"
            )
        names, held = {IDS}, {str(value.name): value for value in graph.inputs}
    else:
        names, held = set(metadata.vectors), dict(graph.initializers)
    sources = [held[name] for name in names - set(metadata.trained) if name in held]
    unread = {str(value.name) for value in sources if not _sums([value])}
    if lost := sorted(names - set(held) | unread):
        what = "input" if metadata.traits.feeds_ids else "vectors"
        raise ExportError(
            f"{path} says that it is of mode {metadata.mode!r}, and nothing is added to its base from {what} "
            f"{shortened(lost)}: a tool renamed, removed or inlined them, and the base can't be told from them; take "
            "the file that export_onnx wrote"
        )
    for total, base in _sums(sources):
        _replace(total, base)
    for value in list(graph.inputs):
        if value in sources or value.name in metadata.trained:
            graph.inputs.remove(value)
    for name in metadata.trained:  # of mode "load" they are in a file of their own, which the new model has no need for
        value = graph.initializers[name]
        value.const_value = ir.tensor(read_tensor(value.const_value), name=name)
    if left := [value.name for value in sources if any(not _dead(use.node) for use in value.uses())]:
        raise ExportError(f"{path}: {shortened(map(str, left))} is used in another way than this package writes")
    common: Any = require("onnx_ir.passes.common", "onnx", "fold into an ONNX model")
    common.RemoveUnusedNodesPass()(model)
    for key in [key for key in model.metadata_props if key.startswith("onelora.")]:
        del model.metadata_props[key]


def _sums(sources: Iterable[onnx_ir.Value]) -> list[tuple[onnx_ir.Node, onnx_ir.Value]]:
    """The first sum on every way from some values, and what these are added to."""
    derived, found = set(sources), []
    pending = list(derived)
    while pending:
        for use in list(pending.pop().uses()):
            others = [value for value in use.node.inputs if value not in derived]
            if use.node.op_type == "Add" and len(others) == 1 and others[0] is not None:
                found.append((use.node, others[0]))
            elif use.node.outputs[0] not in derived:
                derived.add(use.node.outputs[0])
                pending.append(use.node.outputs[0])
    return found


def _replace(total: onnx_ir.Node, base: onnx_ir.Value) -> None:
    """Put what an update was added to in the place of the sum; an output of the graph keeps its name."""
    out = total.outputs[0]
    if out.is_graph_output():
        ir: Any = require("onnx_ir", "onnx", "fold into an ONNX model")
        if base.producer() is None or base.is_graph_output():
            same = ir.node("Identity", [base])
            assert total.graph is not None
            total.graph.insert_before(total, same)
            same.outputs[0].shape, same.outputs[0].type = out.shape, out.type
            base = same.outputs[0]
        out.name, base.name = f"{out.name}_sum", out.name
    out.replace_all_uses_with(base, replace_graph_outputs=True)


def _dead(node: onnx_ir.Node) -> bool:
    """Whether nothing reads what a node gives, or what is made of that."""
    return all(not out.is_graph_output() and all(_dead(use.node) for use in out.uses()) for out in node.outputs)
