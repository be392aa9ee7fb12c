"""One function on every path: {one line, adapt then compile, eager} x {architectures, forms} x {train, eval} x {grad,
no_grad}, against one float64 oracle."""

import paths
import pytest

# What the libraries themselves warn of, which would be errors inside Dynamo.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]
FIRST = {"form:linear"}
MODES = {"train": (True, True), "eval": (False, True), "eval no_grad": (False, False), "train no_grad": (True, False)}
ALL = [
    case if case in FIRST or (case.startswith("form:") and mode == "train") else case
    for case in paths.CASES
    for mode in MODES
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", paths.CASES)
def test_torch_paths(case, mode):
    paths.check_torch_paths(case, *MODES[mode])


@pytest.mark.parametrize("case", paths.CASES)
def test_onnx_paths(case, tmp_path):
    paths.check_onnx_paths(case, tmp_path)
