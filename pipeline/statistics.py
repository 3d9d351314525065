"""Mean image and colour covariance of the training set.

All sums are integers, so neither the order of the images nor the number of workers can change a bit.
"""

from __future__ import annotations

import numpy as np

from pipeline.manifest import IMAGE_SIZE

PIXELS = IMAGE_SIZE * IMAGE_SIZE


class PixelStatistics:
    def __init__(self) -> None:
        self.images = 0
        self._sum = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.int64)
        self._products = np.zeros((3, 3), np.int64)  # sum of r*r, r*g, ... over all pixels

    def add(self, pixels: np.ndarray) -> None:
        """Count one image in: uint8 [256, 256, 3]."""
        self.images += 1
        self._sum += pixels
        # One product a row of pixels: 256 * 255**2 < 2**24, so that float32 is exact, and float32 is what is fast.
        rows = pixels.astype(np.float32)  # [256, 256, 3]
        self._products += (rows.transpose(0, 2, 1) @ rows).astype(np.int64).sum(axis=0)

    def merge(self, other: PixelStatistics) -> None:
        self.images += other.images
        self._sum += other._sum
        self._products += other._products

    def mean_image(self) -> np.ndarray:
        """Return float32 [256, 256, 3], RGB, 0-255. At least one image must have been counted, here and below."""
        return (self._sum / self.images).astype(np.float32)

    def rgb_mean(self) -> np.ndarray:
        """Return float64 [3], 0-255."""
        return self._sum.sum(axis=(0, 1)) / (self.images * PIXELS)

    def rgb_covariance(self) -> np.ndarray:
        """Return float64 [3, 3], of single pixels over all images, 0-255 squared."""
        # Python's integers: the terms pass 2**63, and they are nearly equal.
        pixels = self.images * PIXELS
        total = self._sum.sum(axis=(0, 1)).astype(object)  # [3]
        numerator = pixels * self._products.astype(object) - np.outer(total, total)
        return (numerator / pixels**2).astype(np.float64)
