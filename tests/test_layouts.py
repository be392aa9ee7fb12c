"""Inputs that are no plain tensors: nested, sparse and MKL-DNN ones, whatever the base takes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")


def _rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 8, generator=generator), torch.randn(5, 8, generator=generator)]


INPUTS = {
    "jagged": lambda: torch.nested.nested_tensor(_rows(), layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor(_rows()),
    "sparse": lambda: _rows()[1].relu().to_sparse(),
    "sparse_csr": lambda: _rows()[1].relu().to_sparse_csr(),
    "mkldnn": lambda: _rows()[1].to_mkldnn(),
}


class Doubled(nn.Linear):
    """A linear of a class of its own, with a forward of its own."""

    def forward(self, x):
        return super().forward(x)


def _plain(value: Tensor) -> Tensor:
    if value.is_nested:
        return torch.cat([part.to_dense() for part in value.unbind()])
    return value if value.layout == torch.strided else value.to_dense()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", [nn.Linear, Doubled])
@pytest.mark.parametrize("name", INPUTS)
def test_the_adapted_model_takes_what_the_base_takes(name, kind, grad):
    torch.manual_seed(0)
    model = nn.Sequential(kind(8, 4))
    base, x = copy.deepcopy(model), INPUTS[name]()
    dense = _plain(x).double()
    onelora.adapt(model)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error", onelora.OneLoRAWarning)
        torch.testing.assert_close(_plain(model(x)), _plain(base(x)))
        fill_vectors(model, 0.5)
        (vector,) = onelora.vectors(model).values()
        y = _plain(model(x))
        weight, bias = (one.detach().double() for one in base[0].parameters())
        expected = dense @ (weight + vector.detach().double()[:, None]).T + bias
        plain = (_plain(base(x)) + _plain(x).sum(-1, keepdim=True) * vector).detach()
        assert_parity(y, expected, plain)
        if grad:
            given = torch.linspace(-1, 1, y.numel()).view_as(y)
            (y * given).sum().backward()
            wanted = (dense.sum(-1, keepdim=True) * given.double()).sum(0)
            assert vector.grad is not None
            plain = (_plain(x).sum(-1, keepdim=True) * given).sum(0)
            assert_parity(vector.grad, wanted, plain, floor=8)  # MKL-DNN's is the sum of a matmul's


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_gradients_go_through_jagged_rows(way):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4)), INPUTS["jagged"]()
    fill_vectors(onelora.adapt(model), 0.5)
    vectors = list(onelora.vectors(model).values())
    expected = model(_plain(x))
    wanted = torch.autograd.grad(expected.square().sum(), vectors)
    call = model if way == "eager" else torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    y = _plain(call(x))
    torch.testing.assert_close(y, expected)
    for found, one in zip(torch.autograd.grad(y.square().sum(), vectors), wanted, strict=True):
        torch.testing.assert_close(found, one)
