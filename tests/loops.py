"""A classifier to train, its data, and what tells two of them apart."""

import torch
import zoo
from torch import nn

import onelora_compile as onelora


class Digits(torch.utils.data.Dataset):
    """Sequences of token ids whose label is whether the first is large."""

    def __init__(self, n=64):
        self.ids = torch.randint(0, 64, (n, 9), generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": (self.ids[i, 0] >= 32).long()}


def bert():
    """Dropout off, so that runs can be compared."""
    model, _ = zoo.bert()
    model.config.problem_type = "single_label_classification"
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


CONFIG = onelora.OneLoRAConfig(modules_to_save=["classifier"])


def state(model):
    extra = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.detach().clone() for name, p in extra.items()}


def assert_equal(a, b):
    """The same numbers: of a file, and of the same steps again."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_same(a, b):
    """Of the same steps in another order of sums, which Adam makes much of."""
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
