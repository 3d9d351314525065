"""What packing is measured against. Both work on JPEG files that `decodes` has found whole, in processes that are ready
before the clock starts."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import simplejpeg
from PIL import Image

from pipeline.images import QUALITY, centre_square, encode
from pipeline.manifest import IMAGE_SIZE


def decodes(path: Path) -> bool:
    try:
        simplejpeg.decode_jpeg(path.read_bytes())
    except ValueError:
        return False
    return True


def bare_loop(files: Sequence[Path], processes: int) -> float:
    """Images per second of decode, resize and encode alone: libjpeg-turbo and OpenCV, nothing kept."""
    return _rate(_bare, files, processes)


def usual_script(files: Sequence[Path], processes: int, filter_name: str, out: Path) -> float:
    """Images per second of Pillow: decode, rescale the shorter side, cut the centre, save as JPEG."""
    out.mkdir(exist_ok=True)
    return _rate(partial(_usual, out, filter_name), files, processes)


def _rate(function: Callable[[Sequence[Path]], object], files: Sequence[Path], processes: int) -> float:
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(function, [files[:2]] * processes * 2, chunksize=1)  # imports, warm caches
        began = time.perf_counter()
        pool.map(function, [files[i::processes] for i in range(processes)], chunksize=1)
        return len(files) / (time.perf_counter() - began)


def _bare(files: Sequence[Path]) -> None:
    for path in files:
        encode(centre_square(simplejpeg.decode_jpeg(path.read_bytes())))


def _usual(out: Path, filter_name: str, files: Sequence[Path]) -> None:
    resampling = Image.Resampling[filter_name]
    for path in files:
        with Image.open(path) as image:
            image = image.convert("RGB")
        scale = IMAGE_SIZE / min(image.size)
        width, height = (max(IMAGE_SIZE, round(side * scale)) for side in image.size)
        image = image.resize((width, height), resampling)
        left, top = (width - IMAGE_SIZE) // 2, (height - IMAGE_SIZE) // 2
        image = image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
        image.save(out / f"{path.stem}.jpg", quality=QUALITY)
