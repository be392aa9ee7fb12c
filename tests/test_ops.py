"""The operator against the formula in float64, and its promises to autograd and compilers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onelora_compile.testing import assert_parity, saved_bytes

OPS = torch.ops.onelora


def formula(y, x, vector):
    return y + vector * x.sum(-1, keepdim=True)


def case(shape=(5,), k=16, n=12, dtype=torch.float32, grad=True):
    x = torch.randn(*shape, k, dtype=torch.float64)
    y = torch.randn(*shape, n, dtype=torch.float64)
    vector = torch.randn(n, dtype=torch.float64)
    low = [x.to(dtype), y.to(dtype), vector.to(torch.float64 if dtype == torch.float64 else torch.float32)]
    if grad:
        low = [t.requires_grad_() for t in low]
    return low


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 5), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(("k", "n"), [(16, 12), (1, 1), (13, 7), (4099, 3)])
def test_matches_the_formula_in_float64(dtype, shape, k, n):
    x, y, vector = case(shape, k, n, dtype, grad=False)
    actual = OPS.rank1_update(y, x, vector)
    reference = formula(y.double(), x.double(), vector.double())
    # Plain PyTorch: the formula rounded once would be exact; what a user would write computes in the dtype.
    plain = formula(y, x, vector.to(dtype))
    assert_parity(actual, reference, plain)
    if dtype in (torch.bfloat16, torch.float16) and actual.numel():
        # Tighter than what a user would write: the only rounding to half precision is the last one.
        wide = formula(y.float(), x.float(), vector.float()).to(dtype)
        step = torch.finfo(dtype).eps * wide.abs().max().double()
        assert (actual.double() - wide.double()).abs().max() <= 2 * step


def test_half_precision_sum_does_not_overflow_or_drift():
    x = torch.full((2, 70000), 1.0, dtype=torch.float16)  # its sum is beyond float16
    y = torch.zeros(2, 3, dtype=torch.float16)
    out = OPS.rank1_update(y, x, torch.full((3,), 0.01))
    torch.testing.assert_close(out, torch.full((2, 3), 700.0, dtype=torch.float16))
    small = torch.full((1, 4096), 0.01, dtype=torch.bfloat16)
    drift = OPS.feature_sum(small)
    assert drift.dtype == torch.float32
    torch.testing.assert_close(drift.double(), small.double().sum(-1, keepdim=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_match_float64(dtype):
    x, y, vector = case((4, 3), dtype=dtype)
    g = torch.randn(4, 3, 12, dtype=dtype)
    actual = torch.autograd.grad(OPS.rank1_update(y, x, vector), (y, x, vector), g)
    wide = [t.detach().double().requires_grad_() for t in (y, x, vector)]
    reference = torch.autograd.grad(formula(*wide), wide, g.double())
    plain_in = [t.detach().to(dtype).requires_grad_() for t in (y, x, vector)]
    plain = torch.autograd.grad(formula(*plain_in), plain_in, g)
    for name, a, r, p in zip("yxv", actual, reference, plain, strict=True):
        assert_parity(a, r, p.to(a.dtype), f"gradient of {name}")


def test_gradcheck_to_second_order():
    x, y, vector = case((2, 3), k=4, n=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(OPS.rank1_update, (y, x, vector))
    assert torch.autograd.gradgradcheck(OPS.rank1_update, (y, x, vector))


def test_saves_the_feature_sum_and_not_the_input():
    x, y, vector = case((64,), k=512, n=256)
    vector = torch.nn.Parameter(vector.detach())
    assert saved_bytes(lambda: OPS.rank1_update(y, x, vector)) == 64 * 4
    low = x.detach().bfloat16().requires_grad_()
    assert saved_bytes(lambda: OPS.rank1_update(y.detach().bfloat16(), low, vector)) == 64 * 4


@pytest.mark.parametrize("name", ["rank1_update", "add_rank1", "feature_sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name, dtype):
    x, y, vector = case((3, 2), dtype=dtype)
    arguments = {
        "rank1_update": (y, x, vector),
        "add_rank1": (y, OPS.feature_sum(x), vector),
        "feature_sum": (x,),
    }[name]
    torch.library.opcheck(getattr(OPS, name).default, tuple(a.detach().requires_grad_() for a in arguments))


def test_zero_vector_is_exact():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y, _ = case((9,), dtype=dtype, grad=False)
        assert torch.equal(OPS.rank1_update(y, x, torch.zeros(12)), y)


def test_vector_of_the_wrong_size_is_refused_and_not_broadcast():
    x, y, _ = case((9,), grad=False)
    for size in (1, 11):
        with pytest.raises(RuntimeError, match=rf"vector has {size} entries.*out_features=12"):
            OPS.rank1_update(y, x, torch.ones(size))


def test_vmap_takes_the_operators_apart(capfd):
    # A composite operator of a library falls back to a loop over the batch, with a warning on stderr, unless told how.
    x, y, w, vectors = torch.randn(4, 8), torch.randn(4, 6), torch.randn(6, 8), torch.randn(3, 6)
    update = torch.func.vmap(lambda b: OPS.rank1_update(y, x, b))(vectors)
    weights = torch.func.vmap(lambda b: OPS.adapted_weight(w, b, [1]))(vectors)
    torch.testing.assert_close(update[2], y + x.sum(-1, keepdim=True) * vectors[2])
    torch.testing.assert_close(weights[2], w + vectors[2][:, None])
    assert "performance drop" not in capfd.readouterr().err


def test_works_under_vmap_meta_and_inference_mode():
    x, y, vector = case((4, 3), grad=False)
    mapped = torch.vmap(OPS.rank1_update, (0, 0, None))(y, x, vector)
    torch.testing.assert_close(mapped, formula(y, x, vector))
    meta = OPS.rank1_update(y.to("meta"), x.to("meta"), vector.to("meta"))
    assert (meta.shape, meta.dtype) == (y.shape, y.dtype)
    with torch.inference_mode():
        torch.testing.assert_close(OPS.rank1_update(y, x, vector), formula(y, x, vector))


@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(-4, 4, width=32))
def test_linear_in_the_vector(seed, k, n, scale):
    torch.manual_seed(seed)
    x, y, vector = case((3,), k, n, torch.float64, grad=False)
    one = OPS.rank1_update(y, x, vector) - y
    torch.testing.assert_close(OPS.rank1_update(y, x, vector * scale) - y, one * scale)


def test_non_contiguous_input():
    x, y, vector = case((6, 4), grad=False)
    strided = x.transpose(0, 1)
    torch.testing.assert_close(
        OPS.rank1_update(y.transpose(0, 1), strided, vector), formula(y.transpose(0, 1), strided, vector)
    )
