"""Pack a data set into shards: read, fit to 256x256, encode, sum up, write; the manifest comes last.

One process reads the source and writes the shards, the others fit and encode. What comes out does not
depend on their number, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import DataError, PreprocessError
from pipeline.images import ENCODING, BrokenImage, encode, fit
from pipeline.manifest import FILE_NAME, SPLITS, Manifest, ShardFile, Split, sha256_of, write_durably
from pipeline.shards import ShardWriter
from pipeline.sources import Source, SourceImage, open_source
from pipeline.statistics import PixelStatistics
from pipeline.workers import WorkerLost, Workers

MEAN_NAME = "mean.npy"
REJECTED_NAME = "rejected.jsonl"  # a line: {"split", "name", "label", "reason", "sha256"}
OWN_FILES = re.compile(r"((train|val)-\d{5}\.arrow|mean\.npy|rejected\.jsonl|manifest\.json)(\.tmp)?")

# A chunk goes to a worker at once; this bounds the memory, together with the chunks under way.
CHUNK_IMAGES = 64
CHUNK_BYTES = 16 << 20
CHUNKS_PER_WORKER = 2
MOST_WORKERS = 32  # unless more are asked for: the one process that reads and writes keeps about 20 busy

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None, str], None]  # (images done, images expected or None, split)


def preprocess(source: Path, out: Path, workers: int | None = None, progress: Progress | None = None) -> Manifest:
    """Pack the data set at `source` (a layout of pipeline.sources) into the folder `out`; return its manifest.

    `out` must be new, empty, or left over from a run that was interrupted, which then starts again. Images
    that cannot be read are left out and listed in rejected.jsonl. `workers` defaults to the cores at hand, 32 at most.
    The statistics are those of the fitted training images before they are encoded.

    Raises DataError where the source or `out` is unfit, PreprocessError where `out` cannot be written or a
    worker is killed. After any failure `out` has no manifest.
    """
    source, out = Path(source), Path(out)
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"{out}: lies in the source; choose a folder outside of {source}")
    leftovers = _leftovers(out)
    data = open_source(source)
    workers = workers or min(_cores(), MOST_WORKERS)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in leftovers:
            path.unlink()
        rejected: list[dict] = []
        with Workers(workers, _fit_chunk) as pool:
            train, statistics = _pack(pool, workers, data, "train", out, rejected, progress)
            val, _ = _pack(pool, workers, data, "val", out, rejected, progress)
        write_durably(out / REJECTED_NAME, "".join(json.dumps(entry) + "\n" for entry in rejected).encode())
        manifest = Manifest(
            layout=data.layout,
            encoding=ENCODING,
            classes=data.classes,
            splits={"train": train, "val": val},
            rejected=len(rejected),
            mean=_write_mean(out / MEAN_NAME, statistics),
            rgb_mean=statistics.rgb_mean().tolist(),
            rgb_covariance=statistics.rgb_covariance().tolist(),
        )
        manifest.save(out)
    except WorkerLost as error:
        raise PreprocessError(f"{error}: run again with fewer than {workers} workers, or with more memory") from None
    except OSError as error:  # the source's own are DataErrors
        reason = error.strerror or error
        raise PreprocessError(f"{out}: cannot be written ({reason}): mend that and run again") from None
    _warn_of_empty_classes(manifest)
    return manifest


def _leftovers(out: Path) -> list[Path]:
    """Return the files of an interrupted run in `out`; DataError where it holds anything else."""
    try:
        found = sorted(out.iterdir()) if out.exists() else []
    except OSError as error:
        raise DataError(f"{out}: not a usable folder ({error.strerror}); choose another one") from None
    if out / FILE_NAME in found:
        raise DataError(f"{out}: already holds shards; choose another folder")
    for path in found:
        if not OWN_FILES.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            raise DataError(f"{out}: holds {path.name}, which is not ours; choose a new or empty folder")
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Fitted(NamedTuple):
    """What a worker made of one image."""

    encoded: bytes
    reason: str = ""  # why it was rejected; encoded is then empty
    sha256: str | None = None  # of a rejected file


def _pack(
    pool: Workers, workers: int, data: Source, split: str, out: Path, rejected: list[dict], progress: Progress | None
) -> tuple[Split, PixelStatistics]:
    """Write the shards of one split; append what is left out to `rejected`."""
    statistics = PixelStatistics()
    counts = np.zeros(len(data.classes), np.int64)
    expected, done, first_rejected = data.count(split), 0, len(rejected)
    with ShardWriter(out, split) as writer:
        for entries, (fitted, chunk_statistics) in _in_order(pool, workers, data.read(split)):
            statistics.merge(chunk_statistics)
            for (name, label), image in zip(entries, fitted, strict=True):
                name = _printable(name)
                if image.reason:
                    entry = {"split": split, "name": name, "label": label, "reason": image.reason}
                    rejected.append({**entry, "sha256": image.sha256})
                else:
                    writer.add(image.encoded, label, name)
                    counts[label] += 1
            done += len(entries)
            if progress is not None:
                progress(done, expected, split)
        files = writer.close()
    packed, left_out = int(counts.sum()), len(rejected) - first_rejected
    assert done == packed + left_out and packed == statistics.images == sum(file.images for file in files)
    if not packed:
        example = ""
        if left_out:
            example = "; the first, {name}: {reason}".format(**rejected[first_rejected])
        raise DataError(f"{data.path}: no usable {split} image: {done} found{example}")
    return Split(packed, counts.tolist(), files), statistics


def _in_order(
    pool: Workers, workers: int, images: Iterator[SourceImage]
) -> Iterator[tuple[list[tuple[str, int]], tuple[list[_Fitted], PixelStatistics]]]:
    """Fit chunk after chunk; yield (name, label) of each image with what became of it, in the source's order."""
    under_way: deque = deque()
    for chunk in _chunks(images):
        entries = [(image.name, image.label) for image in chunk]
        under_way.append((entries, pool.submit(chunk)))
        if len(under_way) >= CHUNKS_PER_WORKER * workers:
            entries, result = under_way.popleft()
            yield entries, result.result()
    for entries, result in under_way:
        yield entries, result.result()


def _chunks(images: Iterator[SourceImage]) -> Iterator[list[SourceImage]]:
    chunk: list[SourceImage] = []
    size = 0
    for image in images:
        chunk.append(image)
        size += len(image.data)
        if len(chunk) >= CHUNK_IMAGES or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _fit_chunk(chunk: list[SourceImage]) -> tuple[list[_Fitted], PixelStatistics]:
    """Run in a worker."""
    statistics = PixelStatistics()
    fitted = []
    for image in chunk:
        if image.refused:
            fitted.append(_Fitted(b"", image.refused))
            continue
        try:
            pixels = fit(image.data)
        except BrokenImage as error:
            fitted.append(_Fitted(b"", str(error), hashlib.sha256(image.data).hexdigest()))
            continue
        statistics.add(pixels)
        fitted.append(_Fitted(encode(pixels)))
    return fitted, statistics


def _printable(name: str) -> str:
    """Archives may hold names that are not UTF-8; Arrow's strings may not."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _write_mean(path: Path, statistics: PixelStatistics) -> ShardFile:
    file = io.BytesIO()
    np.save(file, statistics.mean_image())
    write_durably(path, file.getvalue())
    return ShardFile(path.name, statistics.images, path.stat().st_size, sha256_of(path))


def _warn_of_empty_classes(manifest: Manifest) -> None:
    for split in SPLITS:
        empty = [c.wnid for c, count in zip(manifest.classes, manifest.splits[split].class_counts) if not count]
        if empty:
            log.warning("%d of %d classes have no usable %s image: %s",
                        len(empty), len(manifest.classes), split, ", ".join(empty))
