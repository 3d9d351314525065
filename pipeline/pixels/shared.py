"""Two processes that need the same batches: each decodes half of the pictures and gives the other its crops as bytes.

The crops of the next batch travel while the caller computes on this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from pipeline.batches import Batch

if TYPE_CHECKING:
    from pipeline.pixels.on_cpu import PixelsOnCpu


class PictureSwap(Protocol):
    """The link to the other process."""

    rank: int  # 0 or 1: which half of every batch is decoded here

    def begin(self, pictures: torch.Tensor) -> Callable[[], None]:
        """Send half `rank` of pictures [N, ...] and fill the other half; the returned call waits for both."""


def half_of(batch_size: int, rank: int) -> slice:
    return slice(rank * batch_size // 2, (rank + 1) * batch_size // 2)


class SharedPixels:
    """Stands for `pixels`, whose source gives this process's half of each batch of `batch_size`, an even number."""

    def __init__(self, pixels: PixelsOnCpu, swap: PictureSwap, batch_size: int, crop: int):
        self._pixels, self._swap, self._own = pixels, swap, half_of(batch_size, swap.rank)
        # One is filled while floats are made of the other.
        self._memory = [torch.empty(batch_size, crop, crop, 3, dtype=torch.uint8) for _ in range(2)]
        self._begun: tuple[torch.Tensor, Callable[[], None]] | None = None

    def run(self) -> torch.Tensor:
        """Return the crops of the next batch, uint8 [N, crop, crop, 3]."""
        pictures, wait = self._begun or self._begin()
        self._begun = self._begin()
        wait()
        return pictures

    def _begin(self) -> tuple[torch.Tensor, Callable[[], None]]:
        pictures = self._memory.pop(0)
        self._memory.append(pictures)
        pictures[self._own] = torch.from_dlpack(self._pixels.run().as_tensor())
        return pictures, self._swap.begin(pictures)

    def pixels(self, pictures: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return float32 [N, crop, crop, 3]."""
        return self._pixels.finish(pictures.numpy(), batch)


def part_of(batch: Batch, part: slice) -> Batch:
    """Return that part of a batch's images: all, or some where there is one crop an image."""
    return Batch(*(np.asarray(column)[part] for column in vars(batch).values()))
