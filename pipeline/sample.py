"""Write a small drawn data set into the three archives that ILSVRC-2012 is published in, byte for byte repeatable."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from pipeline.drawing import CLASSES, draw
from pipeline.errors import DataError
from pipeline.files import sync
from pipeline.sources import ilsvrc2012

ARCHIVES = (ilsvrc2012.TRAIN, ilsvrc2012.VAL, ilsvrc2012.DEVKIT)

GREY_SHARE = 0.05
LONG_SIDES = (160, 320, 500, 900, 1400)  # pixels, before a variation of a tenth
LONG_SIDE_SHARES = (0.1, 0.15, 0.68, 0.05, 0.02)  # most of the real pictures have 500
LANDSCAPE_SHARE = 0.7
WIDEST = 1.9  # long side by short side
PICTURES_AT_ONCE = 128  # held in memory, encoded
TIME = 1338508800  # of every file in the archives: 1 June 2012, UTC
TRAIN, VAL, ORDER = range(3)  # streams of random numbers

README = """A small data set in the format of ILSVRC-2012's development kit, task 1 and 2.

Every picture was drawn by a program; none is of ImageNet. data/meta.mat describes the classes (those with
num_children 0) and the groups above them; data/ILSVRC2012_validation_ground_truth.txt holds one ILSVRC2012_ID a line,
in the order of the validation files' numbers.
"""
# Internal synsets, as the real meta.mat has them: (wnid, words, gloss, height, the synsets below by ILSVRC2012_ID).
_SHAPES = [c.ilsvrc_id for c in CLASSES if not c.is_texture]
_TEXTURES = [c.ilsvrc_id for c in CLASSES if c.is_texture]
GROUPS = (
    ("n90000100", "shape", "a figure on a ground", 1, _SHAPES),
    ("n90000155", "texture", "a pattern that fills the picture", 1, _TEXTURES),
    ("n90000001", "drawing, drawn picture", "a picture made by a program", 2, [len(CLASSES) + 1, len(CLASSES) + 2]),
)


@dataclass(frozen=True)
class _Picture:
    """What is needed to make one picture, on any thread and in any order."""

    stream: tuple[int, ...]  # seed of its random numbers
    label: int
    mode: str  # "RGB", "L" or "CMYK"


def write_sample(
    out: Path,
    train_per_class: int = 100,
    val_per_class: int = 20,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Draw pictures of ten classes into folder `out`, as ILSVRC-2012's training, validation and devkit archives.

    Equal arguments give equal bytes. One picture in twenty is grey and one training picture is CMYK, whatever its
    class. `progress` is called with the number of pictures finished since the last call.

    Returns the numbers of pictures and classes: {"train", "val", "classes"}. Raises DataError for numbers out of range,
    where one of the archives exists, and where `out` cannot be written; an unfinished archive is removed.
    """
    for name, number, least in (
        ("training pictures a class", train_per_class, 1),
        ("validation pictures a class", val_per_class, 1),
        ("the seed", seed, 0),
    ):
        if number < least:
            raise DataError(f"{name}: {number} given, at least {least} wanted")
    out = Path(out)
    for name in ARCHIVES:
        if (out / name).exists():
            raise DataError(f"{out / name}: exists and is not overwritten; remove it or choose another folder")

    temporary = {name: out / f"{name}.tmp" for name in ARCHIVES}
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            with _Studio(progress) as studio:
                _write_train(temporary[ilsvrc2012.TRAIN], studio, train_per_class, seed)
                truth = _write_val(temporary[ilsvrc2012.VAL], studio, val_per_class, seed)
            _write_devkit(temporary[ilsvrc2012.DEVKIT], truth, train_per_class)
            for name, path in temporary.items():
                os.replace(path, out / name)
            sync(out)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); choose a folder with room to write in") from None
    return {"train": train_per_class * len(CLASSES), "val": val_per_class * len(CLASSES), "classes": len(CLASSES)}


def _write_train(path: Path, studio: _Studio, per_class: int, seed: int) -> None:
    """Write a tar of one tar a class."""
    rng = np.random.default_rng([seed, ORDER, TRAIN])
    modes = _modes(per_class * len(CLASSES), rng, cmyk=1)
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for label, drawn in enumerate(CLASSES):
                first = label * per_class
                pictures = [_Picture((seed, TRAIN, i), label, modes[i]) for i in range(first, first + per_class)]
                # As in the real archives, numbers have gaps and no leading zeros, and the order is the names'.
                numbers = rng.choice(20 * per_class, per_class, replace=False) + 1
                names = sorted(f"{drawn.wnid}_{number}.JPEG" for number in numbers)
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as class_archive:
                    for name, image in zip(names, studio.make(pictures)):
                        _add(class_archive, name, image)
                _add(archive, f"{drawn.wnid}.tar", inner.getvalue())
        _sync(file)


def _write_val(path: Path, studio: _Studio, per_class: int, seed: int) -> list[int]:
    """Write one flat tar, classes mixed; return the ILSVRC2012_ID of each picture in order."""
    rng = np.random.default_rng([seed, ORDER, VAL])
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), per_class)).tolist()
    modes = _modes(len(labels), rng, cmyk=0)
    pictures = [_Picture((seed, VAL, i), label, modes[i]) for i, label in enumerate(labels)]
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for number, image in enumerate(studio.make(pictures), start=1):
                _add(archive, f"ILSVRC2012_val_{number:08d}.JPEG", image)
        _sync(file)
    return [CLASSES[label].ilsvrc_id for label in labels]


def _write_devkit(path: Path, truth: list[int], train_per_class: int) -> None:
    folder = "ILSVRC2012_devkit_t12"
    with open(path, "wb") as file:
        with gzip.GzipFile("", "wb", fileobj=file, mtime=TIME) as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
                _add(archive, f"{folder}", None)
                _add(archive, f"{folder}/readme.txt", README.encode())
                _add(archive, f"{folder}/data", None)
                lines = "".join(f"{number}\n" for number in truth)
                _add(archive, f"{folder}/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())
                _add(archive, f"{folder}/data/meta.mat", _meta_mat(train_per_class))
        _sync(file)


def _meta_mat(train_per_class: int) -> bytes:
    """Return a MATLAB 5 file that holds the struct array `synsets` [synsets, 1], rows by ILSVRC2012_ID."""
    synsets = [
        (c.ilsvrc_id, c.wnid, c.words, c.gloss, 0, np.zeros((1, 0)), 0, train_per_class)
        for c in sorted(CLASSES, key=lambda c: c.ilsvrc_id)
    ]
    for number, (wnid, words, gloss, height, children) in enumerate(GROUPS, start=len(CLASSES) + 1):
        below = np.array([sorted(children)], float)
        synsets.append((number, wnid, words, gloss, len(children), below, height, 0))
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images")
    rows = np.empty((len(synsets), 1), [(field, object) for field in fields])
    for row, synset in enumerate(synsets):
        # MATLAB's numbers are doubles.
        rows[row, 0] = tuple(float(value) if isinstance(value, int) else value for value in synset)
    data = io.BytesIO()
    savemat(data, {"synsets": rows}, do_compression=True)
    data.seek(0)
    data.write(b"MATLAB 5.0 MAT-file, drawn sample".ljust(116))  # scipy writes the time of day here
    return data.getvalue()


class _Studio:
    """Makes pictures on all cores. NumPy and Pillow do most of their work outside the interpreter's lock."""

    def __init__(self, progress: Callable[[int], None] | None):
        self._progress = progress
        self._threads = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 16))

    def __enter__(self) -> _Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def make(self, pictures: list[_Picture]) -> Iterator[bytes]:
        """Yield each picture as the bytes of a JPEG file, in the order given."""
        for first in range(0, len(pictures), PICTURES_AT_ONCE):
            for image in self._threads.map(_jpeg, pictures[first : first + PICTURES_AT_ONCE]):
                if self._progress is not None:
                    self._progress(1)
                yield image


def _jpeg(picture: _Picture) -> bytes:
    rng = np.random.default_rng(picture.stream)
    width, height = _size(rng)
    image = Image.fromarray(draw(picture.label, rng, width, height))
    if picture.mode != "RGB":
        image = image.convert(picture.mode)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=int(rng.integers(86, 95)))
    return data.getvalue()


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Return a picture's width and height in pixels; they depend on nothing but the random numbers."""
    nominal = rng.choice(LONG_SIDES, p=LONG_SIDE_SHARES)
    long = 500 if nominal == 500 else int(nominal * rng.uniform(0.9, 1.1))
    short = int(long / rng.uniform(1, WIDEST))
    return (long, short) if rng.uniform() < LANDSCAPE_SHARE else (short, long)


def _modes(count: int, rng: np.random.Generator, cmyk: int) -> list[str]:
    """Return the pictures' modes: GREY_SHARE of them grey, `cmyk` of them CMYK, anywhere."""
    grey = round(GREY_SHARE * count)
    return rng.permutation(["L"] * grey + ["CMYK"] * cmyk + ["RGB"] * (count - grey - cmyk)).tolist()


def _add(archive: tarfile.TarFile, name: str, data: bytes | None) -> None:
    """Add a file, or a folder where `data` is None, whose header tells nothing of this machine or hour."""
    entry = tarfile.TarInfo(name)  # owner 0, no user name
    entry.mtime = TIME
    if data is None:
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(entry)
    else:
        entry.size, entry.mode = len(data), 0o644
        archive.addfile(entry, io.BytesIO(data))


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
