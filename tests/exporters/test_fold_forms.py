"""fold_onnx over forms of one linear: operator, side, transposes, factor, way to the op, copies, graph level, opset.

Each file is exact against float64 afterwards, or refused by the vector's name.
"""

import itertools
import threading
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_graphs import assert_arrays
from onnx_tools import adapter, used

from onelora_compile.errors import BaseMismatchError, ExportError
from onelora_compile.exporters import fold_onnx

make, info, kinds = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto
OUT, IN, BATCH = 6, 4, 3


def way(name, wanted):
    """Nodes and arrays that give "m", the matrix that the op reads, from what is stored."""
    array = np.ascontiguousarray
    if name == "stored":
        return [], {"m": wanted}
    if name == "constant":
        return [make("Constant", [], ["m"], value=onnx.numpy_helper.from_array(wanted))], {}
    if name == "transpose":
        return [make("Transpose", ["w"], ["m"], perm=[*range(wanted.ndim)][::-1])], {"w": array(wanted.T)}
    if name == "reshape":
        return [make("Reshape", ["w", "s"], ["m"])], {"w": wanted.reshape(-1), "s": np.array(wanted.shape)}
    if name == "cast":
        return [make("Cast", ["w"], ["m"], to=1)], {"w": wanted.astype(np.float64)}
    if name == "concat":
        return [make("Concat", ["w", "v"], ["m"], axis=0)], {"w": array(wanted[:2]), "v": array(wanted[2:])}
    if name == "slice":
        arrays = {"w": np.concatenate([wanted, wanted + 1]), "s": np.array([0]), "e": np.array([len(wanted)])}
        return [make("Slice", ["w", "s", "e"], ["m"])], arrays
    if name == "split":
        return [make("Split", ["w"], ["m", "rest"], axis=0)], {"w": np.concatenate([wanted, wanted + 1])}
    assert name == "scaled"
    return [make("Mul", ["w", "f"], ["m"])], {"w": 2 * wanted, "f": np.array(0.5, np.float32)}


WAYS = ["stored", "constant", "transpose", "reshape", "cast", "concat", "slice", "split", "scaled"]


def operators():
    """Label, node that computes y of x and m, m of W [out, in], x of rows [batch, in], rows of y, factor."""
    same = lambda v: v  # noqa: E731
    turn = lambda v: np.ascontiguousarray(v.T)  # noqa: E731
    yield "MatMul right", make("MatMul", ["x", "m"], ["y"]), turn, same, same, 1
    yield "MatMul left", make("MatMul", ["m", "x"], ["y"]), same, turn, turn, 1
    for a, b, alpha in itertools.product((0, 1), (0, 1), (1.0, 0.25)):
        for op, domain in (("Gemm", ""), ("FusedMatMul", "com.microsoft")):
            extra: dict[str, Any] = {"transA": a, "transB": b, "alpha": alpha}
            right = make(op, ["x", "m"], ["y"], domain=domain, **extra)
            yield f"{op} right {a}{b} {alpha}", right, same if b else turn, turn if a else same, same, alpha
            left = make(op, ["m", "x"], ["y"], domain=domain, **extra)
            yield f"{op} left {a}{b} {alpha}", left, turn if a else same, same if b else turn, turn, alpha
    for equation, orient in (("bi,oi->bo", same), ("bi,io->bo", turn)):
        yield f"Einsum {equation}", make("Einsum", ["x", "m"], ["y"], equation=equation), orient, same, same, 1
    for rank in (1, 2, 3):
        ones = (1,) * rank
        yield (
            f"Conv {rank}d", make("Conv", ["x", "m"], ["y"]), lambda w, o=ones: w.reshape(*w.shape, *o),
            lambda x, o=ones: x.reshape(*x.shape, *o), lambda y: y.reshape(BATCH, -1), 1,
        )  # fmt: skip


OPERATORS = list(operators())


def build(path, node, way_name, m, x_shape, level, opset=17, copies=1):
    nodes, arrays = way(way_name, m)
    body = [*nodes, node]
    inits = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    x, y = info("x", kinds.FLOAT, x_shape), info("y", kinds.FLOAT, None)
    if level == "if":
        bodies = [onnx.helper.make_graph(body, name, [], [y], inits) for name in ("then", "else")]
        flag = onnx.numpy_helper.from_array(np.array(True), "flag")
        outer, held = [make("If", ["flag"], ["out"], then_branch=bodies[0], else_branch=bodies[1])], [flag]
    elif level == "function":
        raise AssertionError(level)
    else:
        outer, held = [*body, make("Identity", ["y"], ["out"])], inits
    graph = onnx.helper.make_graph(outer, "g", [x], [info("out", kinds.FLOAT, None)], held)
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=9), path)


def run(path, x):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("level", ["main", "if"])
@pytest.mark.parametrize("form", OPERATORS, ids=[one[0] for one in OPERATORS])
def test_forms_are_exact(form, level, tmp_path):
    _, node, orient, feed, rows, factor = form
    rng = np.random.default_rng(0)
    weight, x = (rng.normal(size=shape).astype(np.float32) for shape in ((OUT, IN), (BATCH, IN)))
    file, vector = adapter(tmp_path, weight)
    fed = np.ascontiguousarray(feed(x))
    exact = factor * x.astype(np.float64) @ (weight.astype(np.float64) + vector[:, None]).T
    ways = WAYS if level == "main" else WAYS[:2]
    for name in ways:
        build(tmp_path / "m.onnx", node, name, orient(weight), fed.shape, level)
        report = fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
        assert list(report.folded) == ["lin"]
        np.testing.assert_allclose(rows(run(tmp_path / "out.onnx", fed)), exact, rtol=1e-4, atol=1e-5, err_msg=name)
        model = onnx.load(tmp_path / "out.onnx")
        assert not [one for one in model.graph.node if one.op_type in ("Constant", "Split", "Slice", "Concat")], name


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18, 20, 23])
def test_opsets(opset, tmp_path):
    weight = np.random.default_rng(0).normal(size=(OUT, IN)).astype(np.float32)
    file, vector = adapter(tmp_path, weight)
    x = np.ones((BATCH, IN), np.float32)
    exact = x @ (weight + vector[:, None]).T
    for name in ("stored", "constant", "transpose", "cast", "concat", "scaled"):
        build(tmp_path / "m.onnx", make("MatMul", ["x", "m"], ["y"]), name, weight.T.copy(), x.shape, "main", opset)
        fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
        np.testing.assert_allclose(run(tmp_path / "out.onnx", x), exact, rtol=1e-4, atol=1e-5, err_msg=name)


def save(path, nodes, arrays, sparse=(), shape=(BATCH, IN)):
    inits = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    x, y = info("x", kinds.FLOAT, shape), info("y", kinds.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], inits, sparse_initializer=list(sparse))
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


@pytest.mark.parametrize("paths", [("/lin/", "/lin_1/"), ("/lin/", "/lin/"), ("", ""), ("/lin/", ""), ("/lin/", "/b/")])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("targets", ["all-linear", ["lin"]])
@pytest.mark.parametrize("most", [1, 2])
def test_two_uses_of_equal_numbers_are_both_folded_or_refused(most, paths, copies, targets, tmp_path):
    weight = np.random.default_rng(0).normal(size=(IN, IN)).astype(np.float32)
    path, vector = adapter(tmp_path, weight, target_modules=targets)
    file = used(path, 1, most)
    names = ["w", "w"] if copies == 1 else ["w", "w2"]
    nodes = [
        make("MatMul", ["x", names[0]], ["h"], name=f"{paths[0]}MatMul"),
        make("MatMul", ["h", names[1]], ["y"], name=f"{paths[1]}MatMul_1"),
    ]
    save(tmp_path / "m.onnx", nodes, dict.fromkeys(names, weight.T.copy()))
    x = np.ones((BATCH, IN), np.float32)
    frozen = most == 1 and paths == ("/lin/", "/b/") and targets != "all-linear"  # the config leaves it out
    if not frozen and (
        paths == ("/lin/", "/b/")
        or (targets != "all-linear" and paths == ("/lin/", "/lin_1/"))
        or (targets != "all-linear" and paths[1] == "")  # of another layer, tied to it, that has no vector?
        or most == 1  # the second may be that of a frozen copy, or of the same graph once more
    ):
        with pytest.raises(ExportError, match="lin: the same numbers are at w"):
            fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
        return
    fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
    first = (weight + vector.astype(np.float64)[:, None]).T
    second = weight.T.astype(np.float64) if frozen else first
    plain = x @ first.astype(np.float32) @ second.astype(np.float32)
    assert_arrays(run(tmp_path / "out.onnx", x), x.astype(np.float64) @ first @ second, plain)


def test_names_that_folding_gives_may_be_taken(tmp_path):
    weight = np.random.default_rng(0).normal(size=(IN, IN)).astype(np.float32)
    file, vector = adapter(tmp_path, weight)
    nodes = [
        make("MatMul", ["x", "w"], ["a"]), make("Gather", ["w", "i"], ["b"]), make("Add", ["a", "b"], ["c"]),
        make("Mul", ["c", "w.lin.folded"], ["y"]),
    ]  # fmt: skip
    arrays = {"w": weight.T.copy(), "i": np.array([0]), "w.lin.folded": np.full((1, IN), 3, np.float32)}
    save(tmp_path / "m.onnx", nodes, arrays)
    fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
    x = np.ones((BATCH, IN), np.float32)
    exact = 3 * (x @ (weight + vector[:, None]).T + weight.T[:1])
    np.testing.assert_allclose(run(tmp_path / "out.onnx", x), exact, rtol=1e-4, atol=1e-4)


def test_a_weight_that_an_unknown_op_needs_too_is_refused(tmp_path):
    weight = np.random.default_rng(0).normal(size=(IN, IN)).astype(np.float32)
    file, _ = adapter(tmp_path, weight)
    nodes = [make("MatMul", ["x", "w"], ["a"]), make("ReduceMax", ["w"], ["b"]), make("Mul", ["a", "b"], ["y"])]
    save(tmp_path / "m.onnx", nodes, {"w": weight.T.copy()})
    with pytest.raises(ExportError, match="lin: its weight 'w' also goes into ReduceMax"):
        fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")


# What a tool may leave in a file between a weight and a second use of it, and whether W + b 1ᵀ can go there.
COMPUTED: dict[str, Any] = {
    "a mask": (["Mul"], (np.arange(IN * IN).reshape(IN, IN) % 3 > 0).astype(np.float32), False),
    "a factor of each row": (["Mul"], np.linspace(0.5, 2, IN, dtype=np.float32)[:, None], False),
    "a difference": (["Add"], np.linspace(0.5, 2, IN * IN, dtype=np.float32).reshape(IN, IN), False),
    "a square": (["Pow"], np.float32(2), False),
    "two steps": (["Mul", "Sub"], np.linspace(0.5, 2, IN, dtype=np.float32), False),
    "a factor": (["Mul"], np.float32(0.5), True),
    "a sign": (["Mul"], np.float32(-1), True),
}


@pytest.mark.parametrize("allowed", ["error", "allow"])
@pytest.mark.parametrize("computed", COMPUTED)
def test_a_second_use_by_constants_is_folded_too_or_refused(computed, allowed, tmp_path):
    ops, constant, folds = COMPUTED[computed]
    weight = np.random.default_rng(0).normal(size=(IN, IN)).astype(np.float32)
    path, vector = adapter(tmp_path, weight, target_modules="all-linear")
    file = used(path, 1, 2)
    ways = [make(op, [f"w{number or ''}", "k"], [f"w{number + 1}"]) for number, op in enumerate(ops)]
    second = [make("MatMul", ["x", f"w{len(ops)}"], ["b"]), make("Add", ["a", "b"], ["y"])]
    save(
        tmp_path / "m.onnx", [make("MatMul", ["x", "w"], ["a"]), *ways, *second], {"w": weight.T.copy(), "k": constant}
    )
    if not folds:
        with pytest.raises(ExportError, match=f"lin: its weight 'w' also goes into {ops[0]}"):
            fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx", on_missing_uses=allowed)
        assert not (tmp_path / "out.onnx").exists()
        return
    fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx", on_missing_uses=allowed)
    x = np.random.default_rng(1).normal(size=(3, IN)).astype(np.float32)
    exact, plain = (
        x.astype(kind) @ (weight + vector[:, None]).astype(kind).T * (1 + constant) for kind in (np.float64, np.float32)
    )
    assert_arrays(run(tmp_path / "out.onnx", x), exact, plain)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_small_weights_fold_once(shape, tmp_path):
    for seed in range(4):
        weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        file, vector = adapter(tmp_path, weight)
        save(tmp_path / "m.onnx", [make("MatMul", ["x", "w"], ["y"])], {"w": weight.T.copy()}, shape=(1, shape[1]))
        fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
        x = np.ones((1, shape[1]), np.float32)
        exact = x @ (weight + vector[:, None]).T
        np.testing.assert_allclose(run(tmp_path / "out.onnx", x), exact, rtol=1e-5, atol=1e-5)
        with pytest.raises(BaseMismatchError):
            fold_onnx(tmp_path / "out.onnx", file, tmp_path / "twice.onnx")


def test_sparse_initializers_and_strings(tmp_path):
    weight = np.random.default_rng(0).normal(size=(OUT, IN)).astype(np.float32)
    file, vector = adapter(tmp_path, weight)
    nodes = [make("MatMul", ["x", "w"], ["a"]), make("Add", ["a", "bias"], ["y"])]
    values = onnx.numpy_helper.from_array(np.array([5.0], np.float32), "bias")
    sparse = onnx.helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.array([1]), "at"), [OUT])
    save(tmp_path / "m.onnx", nodes, {"w": weight.T.copy(), "words": np.array(["a", "b"], object)}, [sparse])
    fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
    x = np.ones((BATCH, IN), np.float32)
    exact = x @ (weight + vector[:, None]).T + np.eye(OUT)[1] * 5
    np.testing.assert_allclose(run(tmp_path / "out.onnx", x), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of", ["the weight", "something else"])
@pytest.mark.parametrize("coordinates", [False, True])
def test_sparse_constants(of, coordinates, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(OUT, IN)).astype(np.float32)
    if of == "the weight":
        weight *= rng.random(weight.shape) < 0.5
    file, vector = adapter(tmp_path, weight)
    held = weight.T if of == "the weight" else np.eye(OUT, dtype=np.float32)[:1] * 5
    places = np.argwhere(held) if coordinates else np.flatnonzero(held)
    sparse = onnx.helper.make_sparse_tensor(
        onnx.numpy_helper.from_array(held[held != 0], "values"), onnx.numpy_helper.from_array(places, "at"), held.shape
    )
    name, arrays = ("w", {"bias": np.zeros(1, np.float32)}) if of == "the weight" else ("bias", {"w": weight.T.copy()})
    nodes = [make("Constant", [], [name], sparse_value=sparse), make("MatMul", ["x", "w"], ["a"])]
    save(tmp_path / "m.onnx", [*nodes, make("Add", ["a", "bias"], ["y"])], arrays)
    fold_onnx(tmp_path / "m.onnx", file, tmp_path / "out.onnx")
    x = np.ones((BATCH, IN), np.float32)
    exact, plain = (
        x.astype(dtype) @ (weight.astype(dtype) + vector[:, None]).astype(dtype).T + (0 if of == "the weight" else held)
        for dtype in (np.float64, np.float32)
    )
    assert_arrays(run(tmp_path / "out.onnx", x), exact, plain)


def test_two_folds_at_once_leave_the_number_of_threads(tmp_path):
    from onelora_compile.exporters.fold.one_thread import one_thread

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    first, second = one_thread(), one_thread()
    first.__enter__()
    other = threading.Thread(target=second.__enter__)
    other.start()
    other.join()
    first.__exit__(None, None, None)
    assert torch.get_num_threads() == 1
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
