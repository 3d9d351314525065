"""From bytes to floats on the CPU: mean, colour shift, flip and scale in one pass over the memory.

DALI has no operator for it: its own take three passes over floats, together half as long as decoding. Shapes: N images
of a batch, K crops of them.
"""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.batches import Batch
from pipeline.compiled import compiled


@compiled
def _flip(row, out):
    """Copy a row of RGB pixels, uint8 [width * 3], from right to left."""
    # Three times as fast as with signed numbers, which Numba tests for indices that count from the end.
    start, stop, one, two, three = np.uintp(0), np.uintp(len(row)), np.uintp(1), np.uintp(2), np.uintp(3)
    while stop > 0:
        stop -= three
        out[start], out[start + one], out[start + two] = row[stop], row[stop + one], row[stop + two]
        start += three


@compiled
def _finish_row(row, mean, shift, scale, out):
    for x in range(len(out)):
        out[x] = (np.float32(row[x]) - mean[x] + shift[x]) * scale


@compiled
def _finish(images, corners, flips, shifts, means, mean_anchors, mean_flips, scale, out, first, last):
    """Fill out[first:last] of float32 [K, crop, crop * 3] from images uint8 [N, side, side * 3].

    A crop begins at its `corners` in the image and at its `mean_anchors` in the mean; `means` [2, 256, 256 * 3] are the
    mean image and its mirror image. A row of pixels is one axis: loops over long rows become vector instructions.
    """
    rows, width = out.shape[1:]
    flipped, shift = np.empty(width, np.uint8), np.empty(width, np.float32)
    for k in range(first, last):
        image, mean = images[k * len(images) // len(out)], means[1 if mean_flips[k] else 0]
        left, mean_left = 3 * corners[k, 1], 3 * mean_anchors[k, 1]
        if mean_flips[k]:
            mean_left = mean.shape[1] - width - mean_left
        for x in range(width):
            shift[x] = shifts[k, x % 3]
        for y in range(rows):
            row = image[corners[k, 0] + y, left : left + width]
            mean_row = mean[mean_anchors[k, 0] + y, mean_left : mean_left + width]
            if flips[k]:
                _flip(row, flipped)
                _finish_row(flipped, mean_row, shift, scale, out[k, y])
            else:
                _finish_row(row, mean_row, shift, scale, out[k, y])


class Finisher:
    """Makes floats of batches of bytes, with `threads` threads.

    A batch's memory is used again once no tensor refers to it: the system clears fresh memory, page by page, which
    takes longer than filling it.
    """

    def __init__(self, mean: np.ndarray, scale: float, crop: int, threads: int):
        """`mean` is float32 [256, 256, 3]."""
        self._means = np.stack([mean, mean[:, ::-1]]).reshape(2, len(mean), -1)
        self._scale, self._crop, self._threads = np.float32(scale), crop, threads
        self._free: list[np.ndarray] = []
        self._pool = ThreadPoolExecutor(threads)
        weakref.finalize(self, self._pool.shutdown)  # threads end with the Finisher, not some time after

    def finish(self, images: np.ndarray, batch: Batch) -> torch.Tensor:
        """Return float32 [K, crop, crop, 3], the crops of `batch` in its order.

        `images` is uint8 [N, side, side, 3]: the crops themselves, K = N, or whole images with K / N crops each.
        """
        crop, crops = self._crop, len(batch.flips)
        corners = np.zeros_like(batch.anchors) if images.shape[1] == crop else batch.anchors
        pixels = self._memory_for(crops * crop * crop * 3).reshape(crops, crop, crop, 3)
        weakref.finalize(pixels, self._free.append, pixels.base).atexit = False
        arguments = (
            images.reshape(*images.shape[:2], -1), corners, batch.flips, batch.shifts, self._means,
            batch.mean_anchors, batch.mean_flips, self._scale, pixels.reshape(crops, crop, -1),
        )
        bounds = [crops * i // self._threads for i in range(self._threads + 1)]
        for _ in self._pool.map(lambda first, last: _finish(*arguments, first, last), bounds, bounds[1:]):
            pass
        return torch.from_numpy(pixels)  # refers to `pixels`

    def _memory_for(self, floats: int) -> np.ndarray:
        while self._free:
            memory = self._free.pop()
            if len(memory) >= floats:
                return memory[:floats]
        return np.empty(floats, np.float32)
