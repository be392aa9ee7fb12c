"""The module with one linear that tests of other ways to run or hold it build on."""

from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Linear(8, 8)

    def forward(self, x):
        return self.b(x)
