"""What gradients of vectors must be: sums of a merged copy's weight gradients over their input axes."""

import torch

from onelora_compile.adapter import adapted_weights


def row_sums(model, merged, loss_of):
    """By name of the vector; zeros where the loss does not depend on the weight.

    `merged` is `merged_copy(model)` in any dtype, `loss_of(merged)` a scalar.
    """
    targets = adapted_weights(model)
    paths = {id(module): path for path, module in model.named_modules()}
    held = {}
    for name, target in targets.items():
        holder = merged.get_submodule(paths[id(target.module)])
        held[name] = holder._parameters[target.parameter].requires_grad_(True)
    found = torch.autograd.grad(loss_of(merged), list(held.values()), allow_unused=True)
    return {
        name: (torch.zeros_like(held[name]) if gradient is None else gradient).sum(targets[name].dims)
        for name, gradient in zip(held, found, strict=True)
    }
