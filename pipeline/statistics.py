"""Mean image and colour covariance of the training set.

All sums are integers, so neither the order of the images nor the number of workers can change a bit.
"""

from __future__ import annotations

import struct

import cv2
import numpy as np

from pipeline.manifest import IMAGE_SIZE

PIXELS = IMAGE_SIZE * IMAGE_SIZE
SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
_MOST_IN_16_BITS = 65535 // 255  # images whose sum fits
_MOST_IMAGES = (2**63 - 1) // (PIXELS * 255**2)  # whose products fit 64 bits
_HEADER = struct.Struct("<QB6q")  # images, bytes a sum, lower triangle of the products


class PixelStatistics:
    def __init__(self) -> None:
        self.images = 0
        self._sum = np.zeros(SHAPE, np.uint16)  # of each place and channel; wider when there are more images
        self._products = np.zeros((3, 3), np.int64)  # sum of r*r, r*g, ... over all pixels

    def add(self, pixels: np.ndarray) -> None:
        """Count one image in: uint8 [256, 256, 3]."""
        self._make_room(1)
        self._sum += pixels
        channels = cv2.split(pixels)
        # a*b = (a*a + b*b - (a-b)*(a-b)) / 2: sums of squares of bytes and of their differences are exact, and fast.
        squares = [round(cv2.norm(channel, cv2.NORM_L2SQR)) for channel in channels]
        for i in range(3):
            self._products[i, i] += squares[i]
            for j in range(i):
                difference = round(cv2.norm(channels[i], channels[j], cv2.NORM_L2SQR))
                self._products[i, j] += (squares[i] + squares[j] - difference) // 2

    def merge(self, other: PixelStatistics) -> None:
        self._make_room(other.images)
        self._sum += other._sum.astype(self._sum.dtype)
        self._products += other._products

    def mean_image(self) -> np.ndarray:
        """Return float32 [256, 256, 3], RGB, 0-255. At least one image must have been counted, here and below."""
        return (self._sum / np.float64(self.images)).astype(np.float32)

    def rgb_mean(self) -> np.ndarray:
        """Return float64 [3], 0-255."""
        return self._sum.sum(axis=(0, 1), dtype=np.int64) / (self.images * PIXELS)

    def rgb_covariance(self) -> np.ndarray:
        """Return float64 [3, 3], of single pixels over all images, 0-255 squared."""
        # Python's integers: the terms pass 2**63, and they are nearly equal.
        pixels = self.images * PIXELS
        total = self._sum.sum(axis=(0, 1), dtype=np.int64).astype(object)  # [3]
        products = self._products + np.tril(self._products, -1).T
        numerator = pixels * products.astype(object) - np.outer(total, total)
        return (numerator / pixels**2).astype(np.float64)

    def to_bytes(self) -> bytes:
        lower = self._products[np.tril_indices(3)]
        return _HEADER.pack(self.images, self._sum.itemsize, *lower) + self._sum.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> PixelStatistics:
        """Raises ValueError where `data` is not what `to_bytes` gave."""
        try:
            images, width, *lower = _HEADER.unpack_from(data)
            if images > _MOST_IMAGES:
                raise ValueError(f"{images} images")
            statistics = cls()
            statistics._make_room(images)
            if width != statistics._sum.itemsize:
                raise ValueError(f"{width} bytes a sum for {images} images")
            statistics._sum = np.frombuffer(data, statistics._sum.dtype, offset=_HEADER.size).reshape(SHAPE).copy()
        except struct.error as error:
            raise ValueError(str(error)) from None
        largest = images * PIXELS * 255**2
        if statistics._sum.max() > images * 255 or not all(0 <= product <= largest for product in lower):
            raise ValueError(f"sums that {images} images cannot have")
        statistics._products[np.tril_indices(3)] = lower
        return statistics

    def _make_room(self, more: int) -> None:
        """Widen the sums before they overflow: what is sent and stored stays small."""
        self.images += more
        if self.images > _MOST_IN_16_BITS and self._sum.itemsize == 2:
            self._sum = self._sum.astype(np.uint32)
        if self.images > (2**32 - 1) // 255 and self._sum.itemsize == 4:
            self._sum = self._sum.astype(np.uint64)
