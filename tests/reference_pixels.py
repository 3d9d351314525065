"""The transforms of pipeline.loader once more, plainly: Pillow and NumPy in float64, in the order of the recipes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def decoded(jpeg: np.ndarray | bytes) -> np.ndarray:
    """Pillow's RGB pixels, uint8 [H, W, 3], as they are stored (an EXIF orientation is not applied)."""
    return np.asarray(Image.open(io.BytesIO(bytes(jpeg))).convert("RGB"))


def view(
    jpeg: np.ndarray | bytes,
    mean: np.ndarray,
    anchor: tuple[int, int],
    flip: bool,
    shift: np.ndarray | float = 0.0,
    scale: float = 1.0,
    crop: int = 224,
    mean_at: str = "crop",
) -> np.ndarray:
    """One view of one image, float64 [3, crop, crop]."""
    y, x = anchor
    window, centre = np.s_[y : y + crop, x : x + crop], np.s_[16 : 16 + crop, 16 : 16 + crop]
    pixels = decoded(jpeg)[window].astype(np.float64)
    if mean_at == "crop":
        pixels -= mean[window]
    if flip:
        pixels = pixels[:, ::-1]
    if mean_at == "centre":
        pixels = pixels - mean[centre]
    return ((pixels + shift) * scale).transpose(2, 0, 1)
