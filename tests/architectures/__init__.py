"""Builders of small random-weight instances of real architectures, by name; each returns `(model, inputs)`."""

from collections.abc import Callable

from architectures.audio import AUDIO
from architectures.diffusion import DIFFUSION
from architectures.moe import MOE
from architectures.plain import PLAIN
from architectures.text import TEXT
from architectures.vision import VISION

ARCHITECTURES: dict[str, Callable] = {**TEXT, **MOE, **VISION, **AUDIO, **DIFFUSION, **PLAIN}
