"""What the builders and their tests share: the tensor to look at in an output, and weights that all matter."""

from __future__ import annotations

import torch

from onelora_compile.testing import perturb_norms

FIELDS = ("logits_per_image", "logits", "predicted_depth", "sample", "last_hidden_state")


def main_output(output) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):
        if "pred_boxes" in output:
            return torch.cat((output["logits"], output["pred_boxes"]), -1)
        for field in FIELDS:
            if field in output:
                return output[field]
        output = output.values()
    return next(value for value in output if isinstance(value, torch.Tensor))


def settle(model, seed: int = 0):
    """Perturb the norms, fill all-zero parameters (biases, adaLN-zero, zero-initialised outputs); in eval mode."""
    perturb_norms(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(0.1 * noise)
    return model.eval()
