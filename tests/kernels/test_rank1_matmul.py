"""The kernel in Triton's interpreter, against float64: values, gradients, layouts, sizes that fill no tile, nothing."""

import interpreter
import pytest
import torch
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.testing import assert_parity

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (1, 40, 7), (37, 41, 19), (16, 16, 16), (33, 129, 5), (2, 16, 50)]
LAYOUTS = ["contiguous", "transposed", "every second", "padded rows"]


@pytest.fixture(scope="module")
def pool():
    started = interpreter.start()
    yield started
    started.shutdown()


def oracle(a, w, bias=None, row=None, column=None, left=None):
    """The formula in the dtype of its arguments, without the kernel."""
    rows = a.sum(1) if row is None else a @ row
    out = a @ w + rows[:, None] * (w.new_ones(w.shape[1]) if column is None else column)
    return out if bias is None else out + bias, rows, None if left is None else a.T @ left


def check(actual, a, w, **others):
    """Every output against float64, as far off at most as twice plain PyTorch in the same dtype."""
    exact = oracle(a.double(), w.double(), **{k: v.double() for k, v in others.items()})
    wide = oracle(a.float(), w.float(), **{k: v.float() for k, v in others.items()})
    plain = (wide[0].to(a.dtype), *wide[1:])  # rounded once, as the kernel does
    for what, one, reference, baseline in zip(("out", "rows", "down"), actual, exact, plain, strict=True):
        if reference is not None:
            # The order of the sum differs: a few roundings of float32 over in_features.
            assert_parity(one, reference, baseline, what, floor=8 if one.dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("given", ["bias column", "row left", "", "bias row column left"])
def test_values(pool, dtype, size, given):
    m, k, n = size
    a, w = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    sizes = {"bias": n, "column": n, "row": k, "left": m}
    others = {name: torch.randn(sizes[name], dtype=torch.float32) for name in given.split()}
    check(pool.submit(interpreter.matmul, a, w, **others).result(), a, w, **others)


@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("of_w", LAYOUTS)
def test_layouts(pool, of_a, of_w):
    a, w, left = torch.randn(21, 35), torch.randn(35, 18), torch.randn(21)
    actual = pool.submit(interpreter.matmul_of_layouts, a, w, (of_a, of_w), left=left).result()
    check(actual, a, w, left=left)


@pytest.mark.parametrize("size", [(0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0)], ids=str)
def test_nothing(pool, size):
    m, k, n = size
    a, w, left, bias = torch.randn(m, k), torch.randn(k, n), torch.randn(m), torch.randn(n)
    check(pool.submit(interpreter.matmul, a, w, left=left, bias=bias).result(), a, w, left=left, bias=bias)


def test_a_large_sum_does_not_overflow_or_drift_in_half_precision(pool):
    a, w = torch.full((3, 4096), 30.0, dtype=torch.float16), torch.zeros(4096, 2, dtype=torch.float16)
    out, rows, _ = pool.submit(interpreter.matmul, a, w, column=torch.tensor([1e-3, 1e-2])).result()
    assert torch.equal(rows, torch.full((3,), 122880.0))  # twice the largest float16
    torch.testing.assert_close(out, torch.tensor([[122.88, 1228.8]]).half().expand(3, 2))


def test_an_infinite_entry_stays_in_its_row(pool):
    a = torch.ones(20, 33)
    a[3, 7] = torch.inf
    out, rows, _ = pool.submit(interpreter.matmul, a, torch.ones(33, 18)).result()
    assert torch.isinf(out[3]).all()
    assert torch.equal(torch.isinf(rows).nonzero(), torch.tensor([[3]]))
    assert torch.equal(out[:3], torch.full((3, 18), 66.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9,), (1, 9), (2, 5, 33), (0, 9), (3, 0)], ids=str)
@pytest.mark.parametrize("needs", ["x vector", "vector", "x weight bias vector"])
def test_the_operator_s_gradients(pool, dtype, shape, needs):
    n = 21
    values = {
        "x": torch.randn(*shape, dtype=dtype),
        "weight": torch.randn(n, shape[-1], dtype=dtype),
        "bias": torch.randn(n, dtype=dtype),
        "vector": torch.randn(n),
    }
    up = torch.randn(*shape[:-1], n, dtype=dtype)
    y, s, *actual = pool.submit(interpreter.linear, *values.values(), up, needs).result()

    def reference(cast):
        t = {name: cast(value).detach().requires_grad_() for name, value in values.items()}
        out = F.linear(t["x"], t["weight"] + t["vector"][:, None], t["bias"])
        return out, *torch.autograd.grad(out, [t[name] for name in needs.split()], cast(up))

    exact = reference(torch.Tensor.double)
    plain = [one.to(got.dtype) for one, got in zip(reference(torch.Tensor.float), (y, *actual), strict=True)]
    for what, got, want, baseline in zip(["y", *needs.split()], (y, *actual), exact, plain, strict=True):
        assert_parity(got, want, baseline, what, floor=8 if got.dtype == torch.float32 else 1)
    assert s.shape == (*shape[:-1], 1)
    assert s.dtype == torch.float32


def test_opcheck(pool):
    x, vector = torch.randn(2, 3, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    args = (x.detach().requires_grad_(), torch.randn(4, 5), torch.randn(4), vector.detach().requires_grad_())
    pool.submit(interpreter.opcheck, *args).result()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_model_with_the_lowering_forced(pool, dtype, dynamic):
    model = interpreter.model_of(dtype)
    x = torch.randn(2, 7, 9, dtype=dtype)
    up = torch.randn_like(model(x))  # not a square's gradient, which would hold the output's own rounding
    out, grad_x, grads, messages, targets = pool.submit(
        interpreter.train, x, up, model.state_dict(), "fused_kernel", dynamic
    ).result()
    assert not messages
    assert sum("rank1_linear" in target for target in targets) == 3
    assert not any("linear" in target and "rank1" not in target for target in targets)
    assert not any("sum" in target for target in targets)

    def reference(dtype):
        """y + b sum(x) by plain operators, each linear rounded once: what bfloat16 costs anybody."""
        wide, inputs = torch.promote_types(dtype, torch.float32), x.detach().to(dtype).requires_grad_()
        vectors = {name: b.detach().to(wide).requires_grad_() for name, b in onelora.vectors(model).items()}

        def linear(name, x):
            base = getattr(model, name)
            weight = base.weight.detach().to(dtype)
            bias = None if base.bias is None else base.bias.detach().to(dtype)
            s = x.to(wide).sum(-1, keepdim=True)
            return (F.linear(x, weight, bias).to(wide) + s * vectors[name]).to(dtype)

        value = linear("o", F.gelu(linear("q", inputs)) * linear("k", inputs))
        of_x, *of_vectors = torch.autograd.grad(value, [inputs, *vectors.values()], up.to(dtype))
        return value.detach(), of_x, dict(zip(vectors, of_vectors, strict=True))

    exact, plain = reference(torch.float64), reference(dtype)
    assert_parity(out, exact[0], plain[0], floor=8)
    assert_parity(grad_x, exact[1], plain[1], floor=8)
    assert list(grads) == list(exact[2])
    for name, got in grads.items():
        assert_parity(got, exact[2][name], plain[2][name], name, floor=8)


def test_forced_where_no_site_can_take_it(pool):
    model, x = interpreter.model_of(torch.float64), torch.randn(2, 9).double()
    job = pool.submit(interpreter.train, x, x.new_ones(2, 5), model.state_dict(), "fused_kernel", False)
    with pytest.raises(Exception, match=r"none of 3 linears can take it: fused_kernel: no kernel for torch.float64"):
        job.result()
