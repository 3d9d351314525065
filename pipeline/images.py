"""What the shards hold of a picture: its central square, 256 x 256 pixels, as a JPEG or as they are."""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg

from pipeline.decoders import BrokenImage, decode
from pipeline.manifest import IMAGE_SIZE

__all__ = ["ENCODING", "BrokenImage", "encode", "fit"]

QUALITY = 90
ENCODING = f"jpeg, quality {QUALITY}, 4:2:0"

cv2.setNumThreads(1)  # the packer has a process a core


def fit(data: bytes) -> np.ndarray:
    """Decode an image file, rescale its shorter side to 256 and cut out the centre: uint8 [256, 256, 3], RGB.

    The square is cut before it is rescaled, at whole pixels. Raises BrokenImage.
    """
    pixels = decode(data)
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == IMAGE_SIZE:
        return np.ascontiguousarray(square)
    # INTER_AREA averages what falls into a pixel, so that nothing aliases; for enlarging it would repeat pixels.
    interpolation = cv2.INTER_AREA if side > IMAGE_SIZE else cv2.INTER_CUBIC
    return cv2.resize(square, (IMAGE_SIZE, IMAGE_SIZE), interpolation=interpolation)


def encode(pixels: np.ndarray) -> bytes:
    """Compress uint8 [H, W, 3] RGB as ENCODING says."""
    return simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", "420")
