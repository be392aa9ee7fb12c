"""fold_onnx: weights in a file of their own, wherever the model points there: nothing is lost, or read by mistake."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import adapter_of, assert_arrays, session

from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.exporters import fold_onnx, ranges

IN, OUT = 12, 9
WEIGHT = np.random.default_rng(3).normal(size=(OUT, IN)).astype(np.float32)
BIAS = np.arange(OUT, dtype=np.float32)
X = np.random.default_rng(4).normal(size=(4, IN)).astype(np.float32) + 0.3
GEMM = helper.make_node("Gemm", ["x", "w", "c"], ["o"], transB=1)


def value(name, shape=None, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def held():
    return [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(BIAS, "c")]


def constants():
    return [helper.make_node("Constant", [], [one.name], value=one) for one in held()]


def model(nodes, tensors=(), functions=()):
    graph = helper.make_graph(nodes, "g", [value("x", [4, IN])], [value("y", [4, OUT])], tensors)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)


def main():
    return model([GEMM, helper.make_node("Identity", ["o"], ["y"])], held())


def nodes():
    return model([*constants(), GEMM, helper.make_node("Identity", ["o"], ["y"])])


def branch():
    then = helper.make_graph([GEMM], "then", [], [value("o")], held())
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["p"])], "other", [], [value("p")])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other)
    return model([node], [numpy_helper.from_array(np.array(True), "yes")])


def function():
    own = helper.make_function("own", "F", ["x"], ["o"], [*constants(), GEMM], [helper.make_opsetid("", 18)])
    return model([helper.make_node("F", ["x"], ["y"], domain="own")], functions=[own])


WHERE = {one.__name__: one for one in (main, nodes, branch, function)}


def tensors(graph):
    yield from (one for one in getattr(graph, "initializer", ()) if one.name in ("w", "c"))
    for attribute in (one for node in graph.node for one in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        if attribute.HasField("g"):
            yield from tensors(attribute.g)


def written(folder, where, location):
    """A model whose weight and bias are in a file; its adapter, and the outputs in float64 and float32."""
    made, content = WHERE[where](), b""
    for graph in (made.graph, *made.functions):
        for tensor in tensors(graph):
            raw, place = tensor.raw_data, {"location": location, "offset": len(content), "length": len(tensor.raw_data)}
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, one in place.items():
                tensor.external_data.add(key=key, value=str(one))
            content += raw
    (folder / location).parent.mkdir(exist_ok=True)
    (folder / location).write_bytes(content)
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    adapter, (vector,) = adapter_of(folder, WEIGHT)
    merged = WEIGHT + vector[:, None]
    return adapter, *(X.astype(kind) @ merged.astype(kind).T + BIAS for kind in (np.float64, np.float32))


def output(path):
    return session(path).run(None, {"x": X})[0]


@pytest.mark.parametrize("location", ["w.bin", "sub/w.bin", "out.onnx.data", "m.onnx.data"])
@pytest.mark.parametrize("where", WHERE)
def test_the_result_is_whole_in_any_folder(where, location, tmp_path):
    adapter, exact, plain = written(tmp_path, where, location)
    (tmp_path / "elsewhere").mkdir()
    before = {name: (tmp_path / name).read_bytes() for name in ("m.onnx", location)}
    for out in ("elsewhere/out.onnx", "out.onnx", "m.onnx"):
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / out)
        assert_arrays(output(tmp_path / out), exact, plain)
    assert (tmp_path / location).read_bytes() == before[location]


@pytest.mark.parametrize("where", WHERE)
def test_no_output_takes_the_place_of_weights(where, tmp_path):
    adapter, *_ = written(tmp_path, where, "w.onnx")
    before = (tmp_path / "w.onnx").read_bytes()
    with pytest.raises(ConfigError, match="would overwrite the input"):
        fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "w.onnx")
    assert (tmp_path / "w.onnx").read_bytes() == before


@pytest.mark.parametrize("location", ["../w.bin", "absolute"])
@pytest.mark.parametrize("where", WHERE)
def test_nothing_outside_the_folder_is_read(where, location, tmp_path):
    (tmp_path / "own").mkdir()
    place = str(tmp_path / "w.bin") if location == "absolute" else location
    adapter, *_ = written(tmp_path / "own", where, place)
    with pytest.raises(ExportError, match="outside the folder of the model; refused"):
        fold_onnx(tmp_path / "own" / "m.onnx", adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("where", WHERE)
def test_weights_that_are_gone_or_cut_off(where, tmp_path):
    adapter, *_ = written(tmp_path, where, "w.bin")
    whole = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(whole[:-4])
    with pytest.raises(ExportError, match=r"w\.bin, which has \d+: the file is damaged"):
        fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"w\.bin with its weights is missing"):
        fold_onnx(tmp_path / "m.onnx", adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("where", WHERE)
def test_they_are_measured_too(where, tmp_path):
    adapter, exact, _ = written(tmp_path, where, "w.bin")
    largest = ranges(tmp_path / "m.onnx", [{"x": X}], adapter).tensors["y"].largest
    np.testing.assert_allclose(largest, np.abs(exact).max(), rtol=1e-5)


@pytest.mark.parametrize("out", ["..onnx", "a..b.onnx", "...onnx", "..a.onnx", "a.onnx."])
def test_dots_in_the_name_of_the_output(out, tmp_path, monkeypatch):
    adapter, exact, plain = written(tmp_path, "main", "w.bin")
    monkeypatch.chdir(tmp_path)  # of a path from the root onnx.checker says nothing
    for _ in range(2):  # the second finds the weights of the first, and takes them away
        (data,) = fold_onnx("m.onnx", adapter, out).files[1:]
        assert_arrays(output(out), exact, plain)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "w.bin", adapter.name, out, data.name}
