"""Keeping PyTorch's fused transformer layer from computing without the vectors.

In evaluation, `nn.TransformerEncoderLayer` hands its raw weights to one fused kernel and never calls its linears
(`torch/nn/modules/transformer.py`, read in 2.11 to 2.13), so that an adapted layer would silently be the base.  It
does so only where `activation_relu_or_gelu` is set, and `nn.TransformerEncoder` prepares nested tensors for it only
where `use_nested_tensor` is.  Both are plain attributes that nothing else reads.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from onelora_compile.adapting.adapted_module import is_adapted

_SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def close_fast_paths(root: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Switch the fused path off in every layer that holds an adapted linear; return what to put back."""
    closed = []
    for module in root.modules():
        for kind, (attribute, off) in _SWITCHES.items():
            if isinstance(module, kind) and any(map(is_adapted, module.modules())) and hasattr(module, attribute):
                closed.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, off)
    return closed
