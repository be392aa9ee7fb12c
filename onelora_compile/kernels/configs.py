"""Tile sizes of the matmul kernel: what the autotuner tries on a GPU.

Standard tiles of matmuls on Ampere and Hopper; none has been measured yet.  `tests/kernels/test_compile.py` holds that
each compiles for sm_80, sm_87 and sm_90 without spilling registers and within the shared memory of each, by Triton 3.6
to 3.9; larger ones use all registers there are, and spill under one release or another.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile sizes in elements, and how many warps and loads ahead."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8

    @property
    def blocks(self) -> dict[str, int]:
        """The arguments of the kernel."""
        return {name: getattr(self, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}


HALF = (  # two bytes an element
    Tile(16, 64, 64, 4, 4),
    Tile(32, 64, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 128, 32, 4, 4),
    Tile(128, 64, 32, 4, 4),
    Tile(128, 128, 32, 8, 4),
)
FORWARD = (  # besides: backward, with one more sum, they spill registers on sm_80
    Tile(64, 128, 64, 4, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 128, 64, 8, 3),
)
SINGLE = (  # four bytes an element
    Tile(16, 64, 32, 4, 4),
    Tile(32, 64, 16, 4, 4),
    Tile(64, 64, 32, 8, 4),
    Tile(64, 128, 32, 8, 3),
    Tile(128, 64, 32, 16, 3),
)
OPTIONS = {"enable_fp_fusion": True}  # a * b + c with one rounding: Triton 3.9 warns where nobody says so
INTERPRETED = Tile(16, 16, 16, 1, 1, 2)  # small, so that small matrices have several tiles


def tiles(itemsize: int, backward: bool) -> tuple[Tile, ...]:
    """What to try for elements of `itemsize` bytes, in a launch with or without the gradient of the vector."""
    if itemsize == 4:
        return SINGLE
    return HALF if backward else HALF + FORWARD
