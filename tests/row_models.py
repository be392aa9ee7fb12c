"""Models with several adapters, and what each row of a batch is by itself."""

import copy

import torch
import zoo
from torch import nn

import onelora_compile as onelora
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy


def with_adapters(base, count, config=None, scale=0.05):
    """A model with adapters "0", "1", …, the first of them active, and the merged base of each in float64."""
    model = onelora.adapt(copy.deepcopy(base), config, adapter_name="0")
    for number in range(1, count):
        onelora.add_adapter(model, str(number))
    merged = []
    for number in range(count):
        onelora.set_adapter(model, str(number))
        merged.append(merged_copy(fill_vectors(model, scale, number), torch.float64).eval())
    return onelora.set_adapter(model, "0"), merged


class Alone:
    """Rows one by one, each by its own merged model, of the base for -1: in float64, and what float32 makes of that."""

    def __init__(self, merged, base):
        self.wide = [*merged, copy.deepcopy(base).double()]
        self.narrow = [copy.deepcopy(one).float() for one in merged] + [base]

    def check(self, found, inputs, ids, what="output"):
        both = []
        for models, dtype in ((self.wide, torch.float64), (self.narrow, torch.float32)):
            out = []
            for row, number in enumerate(ids):
                one = {key: value[row : row + 1] for key, value in inputs.items()}
                one = {key: value.to(dtype) if value.is_floating_point() else value for key, value in one.items()}
                out.append(zoo.logits(models[number](**one)))
            both.append(torch.cat(out))
        exact, plain = both
        assert_parity(found, exact, plain, what, floor=8)


class Headed(nn.Module):
    """A body and a head, a norm and a batch norm: all that an adapter may train besides its vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.batch = nn.Linear(8, 6), nn.LayerNorm(6), nn.BatchNorm1d(6)
        self.b, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.b(torch.relu(self.batch(self.norm(self.a(x))))))
