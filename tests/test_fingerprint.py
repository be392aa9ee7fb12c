"""Fingerprints: stable for ever, blind to dtype and layout, sharp for everything else."""

import base64

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onelora_compile.weights.fingerprint import Fingerprint, fingerprint, signs


def test_the_sketch_never_changes():
    # These numbers are in every adapter file that exists: a change here orphans them all.
    weight = torch.arange(12, dtype=torch.float32).view(3, 4)
    print_ = fingerprint(weight)
    assert print_.to_json() | {"norm": 0} == GOLDEN | {"norm": 0}
    assert print_.norm == pytest.approx(GOLDEN["norm"], rel=1e-6)


GOLDEN = {
    "shape": [3, 4],
    "dtype": "float32",
    "norm": 22.494443758403985,
    "sketch": "AAAgQQAAIMEAAAAAAADAwAAAhEIAAITCAAAAAAAA8MEAAIRCAACEwgAAAAAAAPDBAACwQQAAsMEAAAAAAAAgwQ==",
}


def test_levels_never_change_and_are_those_of_the_formula():
    weight = torch.arange(32 * 33, dtype=torch.float64).view(32, 33) ** 2
    known = fingerprint(weight)
    for found, axis, stream in ((known.columns, 0, 2), (known.rows, 1, 3)):
        squares = weight.square().sum(axis).numpy()
        logarithms = np.log(squares / squares.mean() + 0.1) / 2
        drawn = np.array(
            [signs(4 * len(squares), stream)[4 * row : 4 * row + 4].flatten() for row in range(len(squares))]
        )
        expected = (logarithms - logarithms.mean()) @ drawn / len(squares) ** 0.5
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=2**-25)  # rounded to float16
    for few in (weight[:31], weight[:, :31], torch.randn(64)[:, None]):
        assert set(fingerprint(few).to_json()) == {"shape", "dtype", "norm", "sketch"}
    zeros = fingerprint(torch.zeros(40, 40))
    assert zeros.columns is not None
    assert not zeros.columns.any()


def test_files_without_levels_and_damaged_levels():
    fields = fingerprint(torch.randn(40, 50)).to_json()
    again = Fingerprint.from_json(fields)
    assert again.to_json() == fields
    older = Fingerprint.from_json({name: one for name, one in fields.items() if name not in ("columns", "rows")})
    assert older.columns is None
    assert older.agrees(again)
    infinite = base64.b64encode(np.full(16, np.inf, "<f2").tobytes()).decode()
    for damage in ({"columns": "AAAA"}, {"rows": "*"}, {"rows": None}, {"columns": infinite}):
        with pytest.raises(ValueError, match="not a fingerprint"):
            Fingerprint.from_json(fields | damage)


def test_the_first_signs_do_not_depend_on_how_many_there_are():
    assert (signs(5, 0) == signs(900, 0)[:5]).all()
    assert set(signs(900, 0).flatten()) == {-1.0, 1.0}
    assert abs(signs(10_000, 1).mean()) < 0.02
    assert (signs(100, 0) != signs(100, 1)).any()


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 3000), (3000, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_agrees_across_dtypes(shape, dtype):
    weight = torch.randn(shape) * 0.02
    assert fingerprint(weight).agrees(fingerprint(weight.to(dtype)))
    assert fingerprint(weight.to(dtype)).agrees(fingerprint(weight))


@given(st.integers(0, 2**31 - 1), st.floats(1e-4, 1.0))
def test_distance_estimates_the_frobenius_distance(seed, size):
    torch.manual_seed(seed)
    weight = torch.randn(40, 60)
    other = weight + size * torch.randn(40, 60)
    exact = ((weight - other).norm() / max(weight.norm(), other.norm())).item()
    assert exact / 4 < fingerprint(weight).distance(fingerprint(other)) < exact * 4
    assert not fingerprint(weight).agrees(fingerprint(other))


def test_other_shape_transpose_and_zero():
    weight = torch.randn(6, 6)
    assert not fingerprint(weight).agrees(fingerprint(weight.T.contiguous()))
    assert fingerprint(weight).agrees(fingerprint(weight.T.contiguous().T))
    assert fingerprint(weight[:5]).distance(fingerprint(weight)) == float("inf")
    zero = fingerprint(torch.zeros(6, 6))
    assert zero.agrees(zero)
    assert not zero.agrees(fingerprint(weight))


def test_json_round_trip_and_damage():
    print_ = fingerprint(torch.randn(5, 3))
    again = Fingerprint.from_json(print_.to_json())
    assert again.distance(print_) == 0
    for damage in ({"shape": [5]}, {"sketch": "AAAA"}, {"sketch": "*"}, {"norm": "x"}, {"norm": -1.0}, {"shape": None}):
        with pytest.raises(ValueError, match="not a fingerprint"):
            Fingerprint.from_json(print_.to_json() | damage)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 3e38])
def test_weights_that_are_not_finite_and_norms_that_float32_does_not_hold(value):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    weight[1, 2] = value
    known = fingerprint(weight)
    assert Fingerprint.from_json(known.to_json()).agrees(known)  # a file that can be read again
    rest = torch.where(weight.isfinite(), weight, 0.0).double()
    assert known.norm == pytest.approx(rest.norm().item(), rel=1e-6)
    assert known.agrees(fingerprint(rest))
