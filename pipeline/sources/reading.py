"""Images read by place: any entry of a source, in any order, in any process."""

from __future__ import annotations

import gzip
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pipeline.errors import DataError
from pipeline.files import creating
from pipeline.sources.archives import COMPRESSED_SUFFIXES, reading, shown
from pipeline.sources.source import Entry

OPEN_FILES = 64  # a source may consist of tens of thousands
PARQUET_SUFFIX = ".parquet"
PARQUET_COLUMN = "image.bytes"
_PARQUET_BATCH_ROWS = 32
_PARQUET_BUFFER_BYTES = 1 << 20
_MOST_KEPT_BYTES = 128 << 20  # of a row group; those of Hugging Face have some 10 to 100 MB
_REMEDY = "restore it and run again"


class Reader:
    """Reads the images that a source lists. One belongs to one process: it holds open files."""

    def __init__(self, root: Path, unpacked: Mapping[str, Path] | None = None):
        """`root` is the source's; `unpacked` names a copy made by `unpack` of each compressed archive."""
        self._root, self._unpacked = root, unpacked or {}
        self._descriptors: dict[str, int] = {}  # by path, the one used last at the end
        self._kept: tuple[Path, int] | None = None  # the Parquet row group that was read last
        self._kept_parts: list[pa.Array] = []

    def read(self, entries: Sequence[Entry]) -> list[bytes]:
        """Return the bytes of each entry, in the order given; none of them may be refused.

        Raises DataError naming the file where it cannot be read, or is no longer what was listed.
        """
        images: list[bytes] = [b""] * len(entries)
        of_parquet: dict[str, list[int]] = defaultdict(list)
        for i, entry in enumerate(entries):
            if entry.archive.endswith(PARQUET_SUFFIX):
                of_parquet[entry.archive].append(i)
            elif entry.archive:
                images[i] = self._read_member(entry)
            else:
                images[i] = self._read_file(entry)
        for archive, positions in of_parquet.items():
            rows = np.array([entries[i].offset for i in positions])
            for i, image in zip(positions, self._read_parquet(self._root / archive, rows)):
                images[i] = image
        return images

    def _read_parquet(self, path: Path, rows: np.ndarray) -> list[bytes]:
        """Return PARQUET_COLUMN of each row, b"" where it is null."""
        images: list[bytes] = [b""] * len(rows)
        try:
            with _naming(path):
                if not path.is_file():  # a pipe would block
                    raise DataError(f"{shown(str(path))}: no plain file any more: {_REMEDY}")
                with pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES) as file:
                    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                    firsts = np.cumsum([0, *sizes])
                    if rows.min() < 0 or rows.max() >= firsts[-1]:
                        raise DataError(f"{shown(str(path))}: has fewer rows than when it was listed: {_REMEDY}")
                    group_of_row = np.searchsorted(firsts, rows, "right") - 1
                    for group in np.unique(group_of_row):
                        positions = np.flatnonzero(group_of_row == group)
                        first = firsts[group]
                        for column in self._row_group(file, path, int(group)):
                            for i in positions[(rows[positions] >= first) & (rows[positions] < first + len(column))]:
                                images[i] = column[int(rows[i] - first)].as_py() or b""
                            first += len(column)
                            if first > rows[positions].max():
                                break
        except (pa.ArrowException, LookupError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{shown(str(path))}: damaged ({reason}): {_REMEDY}") from None
        return images

    def _row_group(self, file: pyarrow.parquet.ParquetFile, path: Path, group: int) -> Iterable[pa.Array]:
        """Return the images of a row group, part by part. One that is not too large is kept for the next call: chunk
        after chunk of images comes from the same group, and it can only be read from its beginning."""
        if self._kept != (path, group):
            parts = (pyarrow.compute.struct_field(batch.column(0), [0]) for batch in file.iter_batches(
                _PARQUET_BATCH_ROWS, [group], [PARQUET_COLUMN], use_threads=False
            ))
            metadata = file.metadata.row_group(group)
            columns = [metadata.column(i) for i in range(metadata.num_columns)]
            if sum(c.total_uncompressed_size for c in columns if c.path_in_schema == PARQUET_COLUMN) > _MOST_KEPT_BYTES:
                return parts
            self._kept, self._kept_parts = None, []  # first let go of the last one
            self._kept, self._kept_parts = (path, group), list(parts)
        return self._kept_parts

    def _read_member(self, entry: Entry) -> bytes:
        # A compressed archive without its copy is the caller's mistake, never to be read at an unpacked offset.
        compressed = entry.archive.endswith(COMPRESSED_SUFFIXES)
        path = self._unpacked[entry.archive] if compressed else self._root / entry.archive
        with _naming(path):
            data = _pread(self._open(str(path)), entry.size, entry.offset)
        if len(data) != entry.size:
            raise DataError(f"{path}: ends inside {shown(entry.member)}, unlike when it was listed: {_REMEDY}")
        return data

    def _read_file(self, entry: Entry) -> bytes:
        path = self._root / entry.member
        with _naming(path):
            descriptor = _open_plain(str(path))
            try:
                data = _pread(descriptor, entry.size + 1, 0)
            finally:
                os.close(descriptor)
        if len(data) != entry.size:
            raise DataError(f"{shown(str(path))}: its size has changed since it was listed: {_REMEDY}")
        return data

    def _open(self, path: str) -> int:
        descriptor = self._descriptors.pop(path, None)
        if descriptor is None:
            if len(self._descriptors) == OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = _open_plain(path)
        self._descriptors[path] = descriptor
        return descriptor

    def __del__(self):
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def unpack(archive: Path, to: Path) -> None:
    """Decompress `archive` (gzip) into a new file `to`, which takes its name when it is whole.

    Raises DataError where the archive is damaged, OSError where `to` cannot be written.
    """
    with creating(to) as copy:
        with reading(archive):
            file = gzip.open(archive)
        with file:
            while True:
                with reading(archive):
                    block = file.read(1 << 20)
                if not block:
                    return
                copy.write(block)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise DataError(f"{shown(str(path))}: cannot be read ({reason}): mend or {_REMEDY}") from None


def _open_plain(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{shown(path)}: not a plain file, unlike when it was listed: {_REMEDY}")
    return descriptor


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """Read `size` bytes, fewer only where the file ends."""
    data = os.pread(descriptor, size, offset)
    while data and len(data) < size:  # a network file system may give less at once
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
