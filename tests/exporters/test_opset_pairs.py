"""lower_opset from every opset to every older one, for every operator that changed: the same numbers."""

import itertools

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir import ExternalTensor
from opset_cases import BF, CASES, NEWEST, changed

import onelora_compile as onelora
from onelora_compile.exporters.jetson.releases import JETPACKS
from onelora_compile.exporters.opsets.lower import lower_opset

OLDEST = 17
WRITTEN = 23  # by exporters of today
NO_RUNTIME = {"ImageDecoder"}  # needs an image: refused by name, that is all


@pytest.fixture(autouse=True)
def _every_opset(monkeypatch):
    """ONNX Runtime runs opsets newer than its release."""
    monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")


def run(model, feed):
    """In ONNX Runtime, or in the reference where that has no such operator (or none so new); None if neither has."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [np.asarray(one) for one in session.run(None, feed)]
    except Exception:  # ONNX Runtime has a dozen, without a common base
        try:
            return [np.asarray(one) for one in ReferenceEvaluator(model).run(None, feed)]
        except Exception:
            return None


def expected_of(case):
    """From the newest opset in which the operator runs."""
    found = (run(case.model(opset), case.feed()) for opset in range(NEWEST, case.since - 1, -1))
    return next((one for one in found if one is not None), None)


def check(case, expected, start, target):
    """Lower from one opset to another; returns whether numbers were compared."""
    model = onnx_ir.from_proto(case.model(start, expected))
    if target < case.lowest:
        with pytest.raises(onelora.ExportError, match=r"^\w+ '[^']*' .*(opset|axes)") as error:
            lower_opset(model, target)
        assert case.op in str(error.value)
        return False
    lower_opset(model, target)
    assert model.opset_imports[""] == target
    made = onnx_ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    found = run(made, case.feed())
    if found is None:
        return False
    for old, new in zip(expected, found, strict=True):
        assert new.size == old.size
        if "seed" in case.attributes or case.op == "Optional":  # chance, and what numpy has no type for
            continue
        assert new.dtype == old.dtype
        if old.dtype == BF:
            np.testing.assert_allclose(new.astype(np.float32), old.astype(np.float32), rtol=1e-2)
        elif old.dtype.kind in "fc":
            tolerance = 2e-3 if old.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(new, old, rtol=tolerance, atol=tolerance / 10, err_msg=f"{start} -> {target}")
        else:
            np.testing.assert_array_equal(new, old, err_msg=f"{start} -> {target}")
    return True


def test_every_operator_that_changed_has_a_case():
    assert {case.op for case in CASES} == changed()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_to_the_opsets_of_every_jetpack(case):
    expected = None if case.op in NO_RUNTIME else expected_of(case)
    start = max(case.since, WRITTEN)
    targets = {jetpack.opset for jetpack in JETPACKS.values() if jetpack.opset < start}
    compared = [check(case, expected, start, target) for target in sorted(targets)]
    assert expected is None or any(compared) or case.lowest > min(targets)
    assert (case.op in NO_RUNTIME) == (expected is None)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pair(case):
    expected = None if case.op in NO_RUNTIME else expected_of(case)
    for target, start in itertools.combinations(range(OLDEST, NEWEST + 1), 2):
        if start >= case.since:
            check(case, expected, start, target)


def test_functions_and_bodies_and_other_domains():
    text = """<ir_version: 10, opset_import: ["": 23, "own": 1, "com.microsoft": 1]>
        main (float[2,6] x, bool c) => (float[2,6] y) {
            h = own.twice (x)
            z = com.microsoft.QuickGelu <alpha = 1.0> (h)
            y = If (c) <then_branch = a () => (float[2,6] p) { p = Gelu (z) },
                        else_branch = b () => (float[2,6] q) { q = Mish (z) }>
        }
        <domain: "own", opset_import: ["": 23]> twice (v) => (w) { g = Gelu (v) w = Mish (g) }"""
    proto = onnx.parser.parse_model(text)
    model = onnx_ir.from_proto(proto)
    lower_opset(model, 17)
    made = onnx_ir.to_proto(model)
    assert not made.functions
    onnx.checker.check_model(made, full_check=True)
    for branch in (True, False):
        feed = {"x": np.linspace(-2, 2, 12, dtype=np.float32).reshape(2, 6), "c": np.array(branch)}
        np.testing.assert_allclose(run(made, feed)[0], run(proto, feed)[0], atol=1e-6)


def test_weights_beyond_two_gigabytes_are_neither_read_nor_copied(tmp_path):
    rows = 600_000
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(4 * rows * 1024)  # without a block on the disk
    weight = ExternalTensor(
        "w.data",
        0,
        4 * rows * 1024,
        onnx_ir.DataType.FLOAT,
        shape=onnx_ir.Shape([rows, 1024]),
        name="w",
        base_dir=tmp_path,
    )
    text = '<ir_version: 10, opset_import: ["": 23]> main (float[1,"n"] x, float[600000,1024] w) => (float[1,1024] y) '
    proto = onnx.parser.parse_model(text + "{ h = MatMul (x, w) y = Gelu (h) }")
    model = onnx_ir.from_proto(proto)
    held = model.graph.inputs.pop()
    held.const_value = weight
    model.graph.register_initializer(held)
    lower_opset(model, 17)
    assert model.graph.initializers["w"].const_value is weight
    assert weight.raw is None
    assert "Gelu" not in {node.op_type for node in model.graph}
