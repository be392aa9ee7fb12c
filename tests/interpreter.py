"""Runs functions in a process in which Triton interprets its kernels on the CPU.

Triton decides that at import, for its own library too, so it can't be switched in the process of the tests.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.multiprocessing

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def start() -> ProcessPoolExecutor:
    """A pool of one such process; close it with `shutdown`."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()  # starts the process, which inherits the environment
    finally:
        del os.environ["TRITON_INTERPRET"]
    return pool


def matmul(*args: Any, **kwargs: Any) -> Any:
    """`rank1_matmul`; each tensor may be (values, function that makes a view of them), as pickling drops strides."""
    from onelora_compile.kernels.rank1_linear import rank1_matmul

    return rank1_matmul(*args, **kwargs)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another layout."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "every second":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "padded rows":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    assert how == "contiguous"
    return x


def matmul_of_layouts(a: torch.Tensor, w: torch.Tensor, layouts: tuple[str, str], **kwargs: Any) -> Any:
    """`rank1_matmul` of the same values in other layouts."""
    return matmul(strided(a, layouts[0]), strided(w, layouts[1]), **kwargs)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any, vector: torch.Tensor, up: torch.Tensor, needs: str) -> Any:
    """Output, feature sum and the gradients of what `needs` names, of the operator."""
    from onelora_compile.kernels.rank1_linear import rank1_linear

    named = {"x": x, "weight": weight, "bias": bias, "vector": vector}
    for name in needs.split():
        named[name].requires_grad_()
    y, s = rank1_linear(x, weight, bias, vector)
    wanted = [named[name] for name in needs.split()]
    return y.detach(), s.detach(), *torch.autograd.grad(y, wanted, up)


def opcheck(*args: Any) -> None:
    """PyTorch's own checks of a custom operator: schema, fake tensors, autograd, AOTAutograd."""
    from onelora_compile.kernels.rank1_linear import rank1_linear

    torch.library.opcheck(rank1_linear, args)


def train(x: torch.Tensor, up: torch.Tensor, state: dict[str, torch.Tensor], lowering: str, dynamic: bool) -> Any:
    """Output, gradients, warnings and the targets of the graph of a compiled model."""
    torch.compiler.reset()
    model = model_of(x.dtype)
    model.load_state_dict(state)
    kept = []

    def inner(gm: Any, inputs: Any) -> Any:
        kept.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    x = x.clone().requires_grad_()
    compiled = torch.compile(
        model, backend="onelora", options={"inner": inner, "lowering": lowering}, dynamic=dynamic or None
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = compiled(x)
        except Exception as error:  # its text alone: what Dynamo of torch 2.11 raises has a module in it, no pickle
            raise RuntimeError(str(error)) from None
        out.backward(up)
    targets = [str(node.target) for gm in kept for node in gm.graph.nodes]
    gradients = {name: vector.grad for name, vector in onelora.vectors(model).items()}
    messages = [str(one.message) for one in caught if issubclass(one.category, onelora.OneLoRAWarning)]
    return out.detach(), x.grad, gradients, messages, targets


class Small(torch.nn.Module):
    """Siblings that read one x, a norm, an activation, and a linear of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = torch.nn.Linear(9, 20), torch.nn.Linear(9, 20, bias=False)
        self.o = torch.nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.nn.functional.gelu(self.q(x)) * self.k(x))


def model_of(dtype: torch.dtype) -> torch.nn.Module:
    """The model, adapted."""
    return fill_vectors(onelora.adapt(Small().to(dtype)), 0.3)
