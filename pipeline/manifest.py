"""The manifest: what a folder of shards holds, and the hashes that prove it.

It is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.files import read_plain, sha256_of
from pipeline.storage import Storage

FILE_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"  # a line: {"split", "archive", "member", "wnid", "reason", "sha256"}
FORMAT = 2
IMAGE_SIZE = 256  # pixels, both sides of every stored image
SPLITS = ("train", "val", "test")  # the last one only where the source has labels for it
STORES = ("jpeg", "raw")


@dataclass(frozen=True)
class SynsetClass:
    """One class. Its label is its position in the list sorted by wnid."""

    wnid: str
    words: str


@dataclass(frozen=True)
class ShardFile:
    name: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    images: int
    rejected: int  # images that were found and left out; rejected.jsonl names each
    class_counts: list[int]  # one a label
    files: list[ShardFile]


@dataclass(frozen=True)
class Manifest:
    layout: str  # of the source, as pipeline.sources names it: "ilsvrc2012", "class-folders", ...
    store: str  # "jpeg" or "raw"
    encoding: str  # how the stored images were compressed
    seed: int  # of the order of the images
    held_out: float  # share of the source's training images that became "val", 0-1; 0 where it has its own
    plan: str  # SHA-256 of what these shards are a function of: the source's listing, the seed, the store
    classes: list[SynsetClass]
    splits: dict[str, Split]  # "train", "val" and, it may be, "test"
    mean: ShardFile  # mean.npy, float32 [256, 256, 3], RGB, 0-255
    rgb_mean: list[float]  # [3], 0-255
    rgb_covariance: list[list[float]]  # [3, 3], of single pixels over the training set, 0-255 squared
    image_size: int = IMAGE_SIZE
    format: int = FORMAT

    @property
    def rejected(self) -> int:
        return sum(split.rejected for split in self.splits.values())

    def save(self, storage: Storage) -> None:
        with storage.create(FILE_NAME) as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())

    def files(self) -> list[ShardFile]:
        return [file for split in self.splits.values() for file in split.files] + [self.mean]


def load_manifest(folder: Path) -> tuple[Manifest, str]:
    """Return the manifest of `folder` and the SHA-256 of its bytes, which names the data set.

    Raises DataError where there is none, or where it is not one of this format.
    """
    path = Path(folder) / FILE_NAME
    try:
        raw = read_plain(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); not a finished folder of shards: "
            "make one with `alexnet preprocess SOURCE OUT`"
        ) from None
    return parse_manifest(raw, str(path)), hashlib.sha256(raw).hexdigest()


def parse_manifest(raw: bytes, path: str) -> Manifest:
    """Return the manifest that the bytes of the file `path` hold; DataError where it is none of this format."""
    try:
        fields = json.loads(raw)
        if type(fields["format"]) is not int:
            raise ValueError("no format")
        if fields["format"] != FORMAT:
            raise DataError(f"{path}: format {fields['format']}, this program reads {FORMAT}: preprocess into "
                            "another folder")
        fields["classes"] = [SynsetClass(**c) for c in fields["classes"]]
        fields["splits"] = {
            name: Split(**{**split, "files": [_shard_file(f) for f in split["files"]]})
            for name, split in fields["splits"].items()
        }
        fields["mean"] = _shard_file(fields["mean"])
        manifest = Manifest(**fields)
        _check(manifest)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{path}: damaged ({reason}); restore it, or preprocess into another folder") from None
    return manifest


def _shard_file(fields: dict) -> ShardFile:
    file = ShardFile(**fields)
    if not re.fullmatch(r"\w[\w.-]*", file.name) or not re.fullmatch("[0-9a-f]{64}", file.sha256):
        raise ValueError(f"no file name and hash: {file.name!r}, {file.sha256!r}")
    if not _counts([file.images, file.bytes]):
        raise ValueError(f"{file.name}: no counts")
    return file


def _counts(numbers: list) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _check(manifest: Manifest) -> None:
    """Raise ValueError for what could not have been written here."""
    wnids = [c.wnid for c in manifest.classes]
    if not wnids or not all(isinstance(text, str) for c in manifest.classes for text in (c.wnid, c.words)):
        raise ValueError("classes are not named")
    if wnids != sorted(set(wnids)):
        raise ValueError("classes are not in order")
    if not {"train", "val"} <= set(manifest.splits) <= set(SPLITS) or manifest.image_size != IMAGE_SIZE:
        raise ValueError("other splits or another image size")
    if manifest.store not in STORES:
        raise ValueError(f"store {manifest.store!r}")
    names = [file.name for file in manifest.files()]
    if len(set(names)) < len(names):
        raise ValueError("a file is listed twice")
    if type(manifest.seed) is not int or not 0 <= manifest.held_out < 1:
        raise ValueError("seed or held_out")
    if not all(isinstance(text, str) for text in (manifest.layout, manifest.encoding, manifest.plan)):
        raise ValueError("layout, encoding or plan")
    for name, split in manifest.splits.items():
        if not _counts([split.images, split.rejected, *split.class_counts]) or len(split.class_counts) != len(wnids):
            raise ValueError(f"class counts of {name}")
        if not split.images == sum(split.class_counts) == sum(file.images for file in split.files):
            raise ValueError(f"counts of {name} disagree")
    mean, covariance = np.array(manifest.rgb_mean, np.float64), np.array(manifest.rgb_covariance, np.float64)
    if mean.shape != (3,) or not (0 <= mean.min() <= mean.max() <= 255):
        raise ValueError("no colour mean")
    if covariance.shape != (3, 3) or not np.isfinite(covariance).all() or np.linalg.eigvalsh(covariance)[0] < -1e-6:
        raise ValueError("no colour covariance")


def check_files(
    folder: Path, files: Iterable[ShardFile], hashes: bool = True, progress: Callable[[int], object] | None = None
) -> None:
    """Raise DataError naming the first file that is missing or whose size (or SHA-256) has changed.

    `progress` is told the bytes of each file when it has been found good.
    """
    for file in files:
        path = Path(folder) / file.name
        try:
            found = path.stat()
            changed = not stat.S_ISREG(found.st_mode) or found.st_size != file.bytes or (
                hashes and sha256_of(path) != file.sha256)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; restore it or preprocess again") from None
        if changed:
            raise DataError(f"{path}: its bytes have changed since the manifest was written; "
                            "restore it or preprocess again")
        if progress is not None:
            progress(file.bytes)

