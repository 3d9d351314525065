"""Prove shards whole: hash, count and decode everything again, in parallel."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
import pyarrow as pa
import simplejpeg

from pipeline.errors import DataError, PreprocessError
from pipeline.manifest import IMAGE_SIZE, REJECTED_NAME, Manifest, ShardFile, check_files
from pipeline.mean import load_mean
from pipeline.progress import Progress
from pipeline.shards import RAW_BYTES, read_batches
from pipeline.storage import Storage
from pipeline.workers import WorkerLost, Workers


def verify(folder: Path, manifest: Manifest, workers: int, progress: Progress | None = None) -> None:
    """Hash every file, decode every image and count the classes.

    Raises DataError naming the first file that is not what it was, and its first image that cannot be decoded;
    PreprocessError where worker processes cannot be started or are killed.
    """
    check_files(folder, [mean := manifest.mean])
    check_mean(folder / mean.name)
    total = sum(split.images for split in manifest.splits.values())
    done = 0
    files = sum(len(split.files) for split in manifest.splits.values())
    try:
        with Workers(max(1, min(workers, files)), ShardChecker(folder, manifest.store)) as pool:
            for split_name, split in manifest.splits.items():
                counts = np.zeros(len(manifest.classes), np.int64)
                for result in as_completed([pool.submit((file, len(manifest.classes))) for file in split.files]):
                    of_file = result.result()
                    counts += of_file
                    done += int(of_file.sum())
                    if progress is not None:
                        progress(done, total, "verifying")
                if counts.tolist() != split.class_counts:
                    raise DataError(f"{folder}: the labels of {split_name} are not those that its manifest counts; "
                                    "restore it or preprocess again")
    except WorkerLost as error:
        raise PreprocessError(f"{folder}: {error}: run again with fewer --workers") from None


def verify_place(storage: Storage, manifest: Manifest) -> None:
    """Look at what a local copy of an object store does not show: that every file is still there, by its size, and that
    rejected.jsonl has as many lines as the manifest counts. DataError where not."""
    where = storage.location
    try:
        sizes, rejected = storage.sizes(), storage.read(REJECTED_NAME)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error}); restore it") from None
    for file in manifest.files():
        if sizes.get(file.name) != file.bytes:
            raise DataError(f"{where}: {file.name} is missing or not {file.bytes} bytes long; preprocess again")
    try:
        of_split = Counter(json.loads(line)["split"] for line in rejected.splitlines())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: {REJECTED_NAME} is damaged ({type(error).__name__}); restore it") from None
    if of_split != Counter({name: split.rejected for name, split in manifest.splits.items()}):
        raise DataError(f"{where}: {REJECTED_NAME} has other lines than the manifest counts; restore it")


def check_mean(path: Path) -> None:
    """Raise DataError unless `path` is a mean image."""
    mean = load_mean(path)
    if not (mean.min() >= 0 and mean.max() <= 255):
        raise DataError(f"{path}: no mean image (values beyond 0 to 255); restore it or preprocess again")


class ShardChecker:
    """A function for pipeline.workers: (file, number of classes) -> images of each class, int64 [classes]."""

    def __init__(self, folder: Path, store: str):
        self._folder, self._store = folder, store

    def __call__(self, task: tuple[ShardFile, int]) -> np.ndarray:
        file, classes = task
        path = self._folder / file.name
        check_files(self._folder, [file])
        batches = read_batches(path)
        labels = np.concatenate([batch.column("label").to_numpy() for batch in batches])
        if len(labels) != file.images or not 0 <= labels.min() <= labels.max() < classes:
            raise DataError(f"{path}: other images or labels than its manifest counts; restore it or preprocess again")
        for batch in batches:
            for image, name in zip(batch.column("image"), batch.column("name")):
                reason = _fault(self._store, image.as_buffer())
                if reason:
                    raise DataError(f"{path}: {name}: {reason}; restore it or preprocess again")
        return np.bincount(labels, minlength=classes)


def _fault(store: str, stored: pa.Buffer) -> str:
    """Return what is wrong with a stored image, or ""."""
    if store == "raw":
        return "" if stored.size == RAW_BYTES else f"{stored.size} bytes and not {RAW_BYTES}"
    try:
        shape = simplejpeg.decode_jpeg(np.frombuffer(stored, np.uint8), strict=True).shape
    except ValueError as error:
        return f"cannot be decoded ({' '.join(str(error).split())})"
    return "" if shape == (IMAGE_SIZE, IMAGE_SIZE, 3) else f"{shape[1]} x {shape[0]} pixels"
