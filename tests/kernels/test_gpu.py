"""The kernel and the measured choice on a CUDA GPU; none of this has run yet."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.kernels import why_not
from onelora_compile.testing import assert_parity, fill_vectors, gradients, merged_copy

pytestmark = pytest.mark.gpu
SIZES = [(1, 4096, 4096), (37, 1000, 513), (512, 1024, 3072), (2048, 4096, 11008)]


@pytest.fixture(autouse=True)
def _able():
    if reason := why_not(torch.device("cuda", 0)):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_against_float64(dtype, size):
    from onelora_compile.kernels.rank1_linear import rank1_linear

    m, k, n = size
    x, weight = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, k, device="cuda", dtype=dtype) / k**0.5
    bias, vector = torch.randn(n, device="cuda", dtype=dtype), torch.randn(n, device="cuda") / k**0.5
    up = torch.randn(m, n, device="cuda", dtype=dtype)

    def reference(cast):
        one, b = cast(x).requires_grad_(), cast(vector).requires_grad_()
        y = F.linear(one, cast(weight), cast(bias)) + one.sum(-1, keepdim=True) * b
        return y, *torch.autograd.grad(y, (one, b), cast(up))

    one, b = x.clone().requires_grad_(), vector.clone().requires_grad_()
    y, _ = rank1_linear(one, weight, bias, b)
    actual = (y, *torch.autograd.grad(y, (one, b), up))
    plain = (t.to(got.dtype) for t, got in zip(reference(lambda t: t.detach().float().clone()), actual, strict=True))
    exact = reference(lambda t: t.detach().double().clone())
    for what, got, want, baseline in zip(("y", "grad x", "grad vector"), actual, exact, plain, strict=True):
        assert_parity(got, want, baseline, what, floor=8 if got.dtype == torch.float32 else 1)


@pytest.mark.parametrize("lowering", [None, "producer_consumer", "fused_kernel"])
def test_a_compiled_model(lowering):
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).cuda()
    model = fill_vectors(onelora.adapt(model))
    x = torch.randn(100, 64, device="cuda", requires_grad=True)
    options = {"lowering": lowering} if lowering else {}
    compiled = torch.compile(model, backend="onelora", options=options)
    actual = gradients(compiled(x).square().sum(), onelora.vectors(model))
    twin = merged_copy(model, torch.float64)
    plain = {name: twin.get_parameter(f"{name}.weight").requires_grad_() for name in ("0", "2")}
    exact = gradients(twin(x.detach().double()).square().sum(), plain)
    for name, value in actual.items():
        assert_parity(value, exact[name].sum(1), exact[name].sum(1).float(), name, floor=64)


SANITIZED = """
import torch
from onelora_compile.kernels.rank1_linear import rank1_linear
x, w = torch.randn(37, 65, device="cuda", requires_grad=True), torch.randn(19, 65, device="cuda")
y, _ = rank1_linear(x, w, torch.randn(19, device="cuda"), torch.randn(19, device="cuda"))
y.sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the path")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_read_or_written_outside_of_tensors(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
