"""Handwritten digits of scikit-learn, and a shifted domain made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from onelora_compile.errors import require

HELD_OUT = 450  # of 1797 images


@dataclasses.dataclass(frozen=True)
class Shift:
    """What turns an original image into one of a shifted domain.

    Attributes:
        name: of the domain.
        text: the same for people.
        degrees: mean rotation, counter-clockwise; each image gets up to `jitter` degrees more or less.
        invert: dark on bright instead of bright on dark.
        move: pixels down and to the right.
        jitter: in degrees.
    """

    name: str
    text: str
    degrees: float
    invert: bool
    move: tuple[int, int]
    jitter: float = 10.0


SHIFT_A = Shift("A", "inverted, rotated by 40 degrees, moved by a pixel", 40.0, True, (0, 1))


@dataclasses.dataclass(frozen=True)
class Domain:
    """Images [*, 8, 8] float32 between 0 and 1, and labels [*], of one domain."""

    name: str
    text: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_domains(seed: int) -> list[Domain]:
    """The original domain and the shifted one, split in the same way: held-out images have no twin in training.

    Args:
        seed: of the split and of the random part of the rotations.
    """
    datasets = require("sklearn.datasets", "demo", "load the digits")
    selection = require("sklearn.model_selection", "demo", "split the digits")
    digits = datasets.load_digits()
    images = (digits.images / 16.0).astype(np.float32)
    train, test = selection.train_test_split(
        np.arange(len(images)), test_size=HELD_OUT, stratify=digits.target, random_state=seed
    )
    labels = torch.from_numpy(digits.target.astype(np.int64))
    moved = shifted(images, SHIFT_A, np.random.default_rng([seed, 0]))
    variants = [("original", "as they are", images), (SHIFT_A.name, SHIFT_A.text, moved)]
    return [
        Domain(name, text, torch.from_numpy(x[train]), labels[train], torch.from_numpy(x[test]), labels[test])
        for name, text, x in variants
    ]


def augmented(images: Tensor, copies: int, seed: int) -> Tensor:
    """The images and `copies` changed versions of them, [*, 8, 8]: small rotations, less contrast.

    A model pretrained on a little variety has features that a few trained numbers can re-use.
    """
    ndimage = require("scipy.ndimage", "demo", "rotate images")
    rng = np.random.default_rng(seed)
    parts = [images.numpy()]
    for _ in range(copies):
        turned = np.stack([ndimage.rotate(i, rng.uniform(-20, 20), reshape=False, order=1) for i in images.numpy()])
        contrast = rng.uniform(0.5, 1.0, (len(turned), 1, 1))
        parts.append(turned.clip(0.0, 1.0) * contrast + (1.0 - contrast) * rng.uniform(0.0, 1.0, contrast.shape))
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def shifted(images: np.ndarray, shift: Shift, rng: np.random.Generator) -> np.ndarray:
    """Images [*, 8, 8] of the shifted domain."""
    ndimage = require("scipy.ndimage", "demo", "rotate images")
    angles = shift.degrees + rng.uniform(-shift.jitter, shift.jitter, len(images))
    turned = [
        ndimage.shift(ndimage.rotate(image, angle, reshape=False, order=1), shift.move, order=0)
        for image, angle in zip(images, angles, strict=True)
    ]
    result = np.stack(turned).clip(0.0, 1.0)
    return (1.0 - result if shift.invert else result).astype(np.float32)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices [size] of `steps` training batches, all full: one shape is one compiled graph.

    The order depends on the seed alone, so that every method sees the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        yield order[:size]
        order = order[size:]
