"""The training set's mean image: reading it, and what it has to be."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.files import read_plain
from pipeline.manifest import IMAGE_SIZE


def load_mean(path: Path) -> np.ndarray:
    """Return the mean image in a .npy file, float32 [256, 256, 3], RGB, 0-255. DataError where it holds none."""
    try:
        mean = np.load(io.BytesIO(read_plain(path)), allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:  # a header may ask for any amount of memory
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read ({reason}); restore it or preprocess again") from None
    return checked(mean, str(path))


def checked(mean: np.ndarray, name: str = "mean image") -> np.ndarray:
    """Return `mean`. DataError, which says its `name`, where it is not float32 [256, 256, 3]."""
    if mean.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or mean.dtype != np.float32:
        raise DataError(f"{name}: {mean.dtype} {list(mean.shape)} and not float32 "
                        f"{[IMAGE_SIZE, IMAGE_SIZE, 3]}: preprocess again")
    return mean
