"""What gradients of vectors must be: sums of a merged copy's weight gradients over their input axes."""

import torch

from onelora_compile.adapting.adapter_state import adapted_weights


def row_sums(model, merged, loss_of, absolute=False):
    """By name of the vector; zeros where the loss does not depend on the weight.

    `merged` is `merged_copy(model)` in any dtype, `loss_of(merged)` a scalar.  `absolute` sums magnitudes: what
    rounding errors are relative to where the terms cancel.
    """
    targets = adapted_weights(model)
    paths = {id(module): path for path, module in model.named_modules()}
    held = {}
    for name, target in targets.items():
        holder = merged.get_submodule(paths[id(target.module)])
        held[name] = holder._parameters[target.parameter].requires_grad_(True)
    found = torch.autograd.grad(loss_of(merged), list(held.values()), allow_unused=True)
    pairs = zip(held.items(), found, strict=True)
    terms = {name: torch.zeros_like(weight) if gradient is None else gradient for (name, weight), gradient in pairs}
    return {name: (term.abs() if absolute else term).sum(targets[name].dims) for name, term in terms.items()}
