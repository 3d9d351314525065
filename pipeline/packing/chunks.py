"""What worker processes do: read, fit and encode a chunk of images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.images import BrokenImage, encode, fit
from pipeline.sources import Entry
from pipeline.sources.archives import LARGEST_BYTES, TOO_LARGE
from pipeline.sources.reading import Reader
from pipeline.statistics import PixelStatistics

# A chunk goes to a worker at once; this bounds the memory, together with the chunks under way.
CHUNK_IMAGES = 64
CHUNK_BYTES = 16 << 20


class Fitted(NamedTuple):
    """What became of one image."""

    stored: bytes  # as the store wants it; empty if it was rejected
    reason: str = ""  # why it was rejected
    sha256: str | None = None  # of a rejected file, if it was read


class ChunkFitter:
    """A function for pipeline.workers: chunk -> (Fitted of each image, statistics of those that could be read)."""

    def __init__(self, root: Path, unpacked: Mapping[str, Path], store: str):
        self._source, self._store, self._reader = (root, unpacked), store, None

    def __call__(self, chunk: Sequence[Entry]) -> tuple[list[Fitted], PixelStatistics]:
        """Raises DataError where the source cannot be read."""
        if self._reader is None:  # made here, in the worker: it holds open files
            self._reader = Reader(*self._source)
        statistics = PixelStatistics()
        fitted = []
        data_of = iter(self._reader.read([entry for entry in chunk if not entry.refused]))
        for entry in chunk:
            if entry.refused:
                fitted.append(Fitted(b"", entry.refused))
                continue
            data = next(data_of)
            if len(data) > LARGEST_BYTES:  # in Parquet nobody knew before
                fitted.append(Fitted(b"", TOO_LARGE))
                continue
            try:
                pixels = fit(data)
            except BrokenImage as error:
                fitted.append(Fitted(b"", str(error), hashlib.sha256(data).hexdigest()))
                continue
            statistics.add(pixels)
            fitted.append(Fitted(pixels.tobytes() if self._store == "raw" else encode(pixels)))
        return fitted, statistics


def chunks(entries: Sequence[Entry]) -> Iterator[slice]:
    """Cut entries into chunks of bounded number and size; a block, which is read as a whole, into as few as may be."""
    first, size = 0, 0
    for i, entry in enumerate(entries):
        in_block = i > 0 and entry.block >= 0 and entry.block == entries[i - 1].block
        most = 2 * CHUNK_IMAGES if in_block else CHUNK_IMAGES
        if i > first and (i - first >= most or size + entry.size > CHUNK_BYTES):
            yield slice(first, i)
            first, size = i, 0
        size += entry.size
    yield slice(first, len(entries))
