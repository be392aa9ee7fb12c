"""No file gets its name before the checker has passed it and ONNX Runtime has opened it, where they do so the base."""

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_graphs import adapter_of

from onelora_compile.errors import ExportError
from onelora_compile.exporters import fold_onnx
from onelora_compile.exporters.fold.put_vectors import Folding
from onelora_compile.exporters.onnx_file.check import check_opens


def model(path, *nodes, **fields):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes), "g", [value("x", 1, [2, 3])], [value("y", 1, [2, 3])],
        [onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 12), helper.make_opsetid("mylib", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=7, **fields), path)
    return path


GOOD = helper.make_node("MatMul", ["x", "w"], ["y"])
BAD = {
    "axes as an input at opset 12": helper.make_node("ReduceSum", ["x", "w"], ["y"]),
    "a value that nothing makes": helper.make_node("MatMul", ["x", "v"], ["y"]),
    "no such operator": helper.make_node("Nothing", ["x", "w"], ["y"]),
    "of another runtime": helper.make_node("Linear", ["x", "w"], ["y"], domain="mylib"),
    "types that do not fit": helper.make_node("And", ["x", "w"], ["y"]),
}


def test_what_opens_passes(tmp_path):
    path = model(tmp_path / "m.onnx", GOOD)
    check_opens(path, tmp_path / "a base that is not even read")


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_open_is_refused_where_the_base_opens(kind, tmp_path):
    bad, base = model(tmp_path / "bad.onnx", BAD[kind]), model(tmp_path / "base.onnx", GOOD)
    with pytest.raises(ExportError, match=r"(onnx.checker|ONNX Runtime) refuses .* made of base.onnx"):
        check_opens(bad, base)
    check_opens(bad, bad)  # a base that does not open itself


def test_fold_onnx_gives_no_name_to_a_file_that_does_not_open(tmp_path, monkeypatch):
    base = model(tmp_path / "base.onnx", GOOD)
    adapter, _ = adapter_of(tmp_path, np.eye(3, dtype=np.float32))
    before = sorted(tmp_path.iterdir())

    def damage(folder, weight, placed):
        import onnx_ir

        folder.model.graph.append(onnx_ir.node("Nothing", []))

    monkeypatch.setattr(Folding, "fold", damage)
    with pytest.raises(ExportError, match="Nothing was written"):
        fold_onnx(base, adapter, tmp_path / "out.onnx")
    assert sorted(tmp_path.iterdir()) == before
