"""Inputs that do not fit the model: an error that says which, and what to give; what fits exactly is converted."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onelora_compile.errors import ConfigError, ExportError
from onelora_compile.exporters import OnnxRunner, ranges

IDS, X = np.array([[0, 1], [2, 0]], np.int64), np.arange(12, dtype=np.float32).reshape(2, 2, 3)


@pytest.fixture
def path(tmp_path):
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (int64[batch, 2] ids, float[batch, 2, 3] x) => (float[batch, 2, 3] y)
        <float[3, 3] table = {1, 2, 3, 4, 5, 6, 7, 8, 9}> { e = Gather(table, ids) y = Add(e, x) }"""
    )
    ir.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"x": X.astype(np.float64)}, "'x' takes float32 .*given was float64.*astype\\('float32'\\)"),
    "float": ({"ids": IDS.astype(np.float32)}, "'ids' takes int64 .*given was float32"),
    "integers": ({"x": IDS}, "'x' takes float32 .*given was int64"),
    "rank": ({"x": X[0]}, r"'x' takes float32 \[batch, 2, 3\]; given was float32 \[2, 3\]"),
    "size": ({"x": X[:, :, :2]}, r"'x' takes float32 \[batch, 2, 3\]; given was float32 \[2, 2, 2\]"),
    "text": ({"x": np.full((2, 2, 3), "a")}, "'x' takes float32 .*given was <U1"),
    "large": ({"ids": np.full((2, 2), 2**63, np.uint64)}, "'ids' takes int64 .*given was uint64"),
    "ragged": ({"ids": [[0, 1], [2]]}, "'ids' is no array"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_with_what_helps(name, path):
    given, told = WRONG[name]
    with pytest.raises(ExportError, match=told):
        OnnxRunner(path).run({"ids": IDS, "x": X, **given})
    with pytest.raises(ConfigError, match=told):
        ranges(path, {"ids": IDS, "x": X, **given})


@pytest.mark.parametrize(
    "given",
    [{"ids": IDS.astype(np.int32)}, {"ids": IDS.astype(np.uint64)}, {"x": X.astype(np.float16)}, {"x": X.tolist()}],
)
def test_what_fits_exactly_is_converted(given, path):
    runner = OnnxRunner(path)
    (expected,) = runner.run({"ids": IDS, "x": X})
    (found,) = runner.run({"ids": IDS, "x": X, **given})
    np.testing.assert_array_equal(found, expected)
    assert ranges(path, {"ids": IDS, "x": X, **given}).tensors["y"].largest == expected.max()


def test_an_unknown_name_is_named(path):
    with pytest.raises(ExportError, match=r"takes \['ids', 'x'\]; \['z'\] are none of these"):
        OnnxRunner(path).run({"ids": IDS, "x": X, "z": X})
