"""What the shards hold of a picture: its central square, 256 x 256 pixels, as a JPEG or as they are."""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg

from pipeline.decoders import TOO_MUCH_MEMORY, BrokenImage, decode
from pipeline.manifest import IMAGE_SIZE

__all__ = ["ENCODING", "BrokenImage", "centre_square", "encode", "encoding_of", "fit"]

QUALITY = 90
ENCODING = f"jpeg, quality {QUALITY}, 4:2:0"

cv2.setNumThreads(1)  # the packer has a process a core


def fit(data: bytes) -> np.ndarray:
    """Decode an image file and fit it: uint8 [256, 256, 3], RGB. Raises BrokenImage."""
    pixels = decode(data)
    try:
        return centre_square(pixels)
    except cv2.error as error:
        if error.code != cv2.Error.StsNoMem:
            raise
        raise BrokenImage(TOO_MUCH_MEMORY) from None


def centre_square(pixels: np.ndarray) -> np.ndarray:
    """Cut the central square out of uint8 [H, W, 3], at whole pixels, and rescale it to [256, 256, 3]."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == IMAGE_SIZE:
        return np.ascontiguousarray(square)
    if side < IMAGE_SIZE:
        return cv2.resize(square, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC)
    # OpenCV averages whole blocks, and makes the enlargement to a multiple of 256 that they need, in half the time
    # that it takes to average parts of pixels; and this aliases less (docs/images.md).
    multiple = -(-side // IMAGE_SIZE) * IMAGE_SIZE
    enlarged = cv2.resize(square, (multiple, multiple), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(enlarged, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)


def encoding_of(store: str) -> str:
    """Say how images are stored, for the manifest."""
    return ENCODING if store == "jpeg" else "raw RGB"


def encode(pixels: np.ndarray) -> bytes:
    """Compress uint8 [H, W, 3] RGB as ENCODING says."""
    return simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", "420")
