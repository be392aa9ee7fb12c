"""Comparisons that tests, benchmarks and users share.

The rule: compute in float64 (`reference`), in the working dtype with plain PyTorch (`plain`), and with what is under
test (`actual`); the error of `actual` may be at most twice that of `plain`.  So the tolerance follows dtype, size
and hardware by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapted_module import detach_vectors, is_adapted
from onelora_compile.adapting.adapter import unwrap
from onelora_compile.adapting.adapter_state import adapted_weights

Model = TypeVar("Model", bound=nn.Module)


def merged_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """An unadapted copy whose weights are W + b 1ᵀ, computed in float64: the oracle for everything else.

    Uses nothing of the operators, passes or `merge`: the weights are new tensors, so shared ones are untied.

    Args:
        model: adapted or not, plain or compiled.
        dtype: of the copy; None keeps each parameter's own.
    """
    twin = copy.deepcopy(unwrap(model))
    if dtype is not None:
        twin = twin.to(dtype)
    merged: list[tuple[nn.Module, str, nn.Parameter]] = []
    for target in adapted_weights(twin).values():
        weight = target.weight
        assert weight is not None
        assert target.dims
        update = target.vector.detach().double()
        for dim in target.dims:  # ascending: each unsqueeze puts back one input axis
            update = update.unsqueeze(dim)
        value = (weight.detach().double() + update).to(weight.dtype)
        merged.append((target.module, target.parameter, nn.Parameter(value, requires_grad=weight.requires_grad)))
    for module in [module for module in twin.modules() if is_adapted(module)]:
        detach_vectors(module)
    for module, name, weight in merged:
        setattr(module, name, weight)
    return twin


def fill_vectors(model: Model, scale: float = 0.02, seed: int = 0) -> Model:
    """Give every vector random values, as training would; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for target in adapted_weights(unwrap(model)).values():
            vector = target.vector
            vector.copy_(torch.randn(vector.shape, generator=generator, device="cpu").to(vector) * scale)
    return model


def perturb_norms(model: Model, seed: int = 0) -> Model:
    """Move the parameters of normalisation layers off 1 and 0; returns the model.

    A LayerNorm with weight 1 and bias 0 has outputs that sum to zero, so the vectors of the linears after it get
    no gradient; a freshly initialised model is such a case, a trained one is not.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
                    parameter.add_(noise, alpha=0.3)
    return model


def assert_parity(
    actual: Tensor, reference: Tensor, plain: Tensor, what: str = "output", factor: float = 2.0, floor: float = 1.0
) -> None:
    """Check `max|actual - reference| <= factor * max|plain - reference| + floor * eps * max|reference|`.

    Args:
        actual: the tensor under test.
        reference: the same in float64.
        plain: the same by plain PyTorch in the dtype of `actual`.
        what: named in the message.
        factor: how much larger than plain PyTorch's the error may be.
        floor: in units of the dtype's machine epsilon at the largest magnitude: where plain is exact by luck.

    Raises:
        AssertionError: too large, another shape or dtype, or not finite; both errors are in the message.
    """
    assert actual.shape == reference.shape, f"{what}: shape {list(actual.shape)}, expected {list(reference.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error = (actual.double() - reference).abs().max().item() if actual.numel() else 0.0
    baseline = (plain.double() - reference).abs().max().item() if plain.numel() else 0.0
    size = reference.abs().max().item() if reference.numel() else 0.0
    allowed = factor * baseline + floor * torch.finfo(actual.dtype).eps * size
    assert error <= allowed, f"{what}: error {error:.3e}, plain PyTorch's is {baseline:.3e}, allowed {allowed:.3e}"


def gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a scalar by name; zeros where it does not depend on a parameter."""
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), values, strict=True)
    return {name: torch.zeros_like(parameter) if value is None else value for (name, parameter), value in pairs}


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps for backward during `run`, without the model's own parameters.

    Counts each storage once, whole, as a view keeps all of it alive.
    """
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        # A linear saves a view of its weight; inside autograd the view still knows whose.
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = (tensor, storage.nbytes())  # the tensor keeps the address taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for _, size in storages.values())
