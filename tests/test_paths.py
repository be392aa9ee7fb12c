"""One function on every path: {one line, adapt then compile, eager, exported, folded into a foreign file} x {every
architecture, every form} x {train, eval} x {grad, no_grad}, against one float64 oracle.

The default run walks every form in one mode and some through ONNX; `-m slow` walks the rest.
"""

import paths
import pytest

# What the libraries themselves warn of, which would be errors inside Dynamo.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning"),
]
MODES = {"train": (True, True), "eval": (False, True), "eval no_grad": (False, False), "train no_grad": (True, False)}
FORMS = [case for case in paths.CASES if case.startswith("form:")]


def cases(*first):
    """Every case in every mode; those that are not in `first` are slow."""
    return [
        case if case in first else pytest.param(*case, marks=pytest.mark.slow)
        for case in ((case, mode) for case in paths.CASES for mode in MODES)
    ]


@pytest.mark.parametrize(("case", "mode"), cases(*((case, "train") for case in FORMS), ("gpt2", "eval no_grad")))
def test_torch_paths(case, mode):
    paths.check_torch_paths(case, *MODES[mode])


ONNX_FIRST = {*FORMS[::8], "albert"}


@pytest.mark.parametrize(
    "case", [case if case in ONNX_FIRST else pytest.param(case, marks=pytest.mark.slow) for case in paths.CASES]
)
def test_onnx_paths(case, tmp_path):
    paths.check_onnx_paths(case, tmp_path)
