"""The index of a source: every entry of one split, on disk, so that memory does not grow with their number."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.files import scratch_file
from pipeline.sources import Entry, Source
from pipeline.sources.archives import shown

# Paths as bytes: they need not be UTF-8.
SCHEMA = pa.schema([
    ("archive", pa.binary()), ("member", pa.binary()), ("label", pa.int32()), ("offset", pa.int64()),
    ("size", pa.int64()), ("refused", pa.string()), ("block", pa.int32()),
])
ROWS_PER_BATCH = 1 << 14


class Index:
    """Entries of one split, in the source's order, behind a memory-mapped file that has no name any more: a killed
    process leaves nothing behind."""

    def __init__(self, source: Source, split: str, progress: Callable[[int], object] | None = None):
        """List `split`; `progress` is told the number of entries now and then.

        Raises DataError as the source does, and where the split has no entry.
        """
        digest = hashlib.sha256()
        with scratch_file() as file:
            with pa.ipc.new_file(file, SCHEMA) as writer:
                self.entries = 0
                self.compressed: set[str] = set()  # archives in which nothing can be found by its offset
                for batch in _batches(_checked(source, split)):
                    writer.write_batch(batch)
                    for column in batch.columns:
                        _hash(digest, column)
                    self.entries += batch.num_rows
                    archives = {os.fsdecode(path) for path in batch.column("archive").unique().to_pylist()}
                    self.compressed |= {path for path in archives if path.endswith((".gz", ".tgz"))}
                    if progress is not None:
                        progress(self.entries)
            file.flush()
            reader = pa.ipc.open_file(pa.memory_map(file.name))
        if not self.entries:
            raise DataError(f"{source.path}: no {split} image found")
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._first_row = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        self.sha256 = digest.hexdigest()  # of all entries: tells one source from another

    def blocks(self) -> np.ndarray:
        """Return the block of every entry, int32; -1 where it stands alone."""
        return np.concatenate([batch.column("block").to_numpy() for batch in self._batches])

    def refused(self) -> Iterator[Entry]:
        """List the entries that are not to be read."""
        for batch, first in zip(self._batches, self._first_row):
            for row in np.flatnonzero(batch.column("refused").to_numpy(zero_copy_only=False) != ""):
                yield from self.take(np.array([first + row]))

    def take(self, rows: np.ndarray) -> list[Entry]:
        """Return the entries at `rows`, which must be sorted."""
        entries = []
        for batch, first, end in zip(self._batches, self._first_row, self._first_row[1:]):
            start, stop = np.searchsorted(rows, [first, end])
            if start == stop:
                continue
            taken = batch.take(pa.array(rows[start:stop] - first))
            for archive, member, *rest in zip(*(column.to_pylist() for column in taken.columns)):
                entries.append(Entry(os.fsdecode(archive), os.fsdecode(member), *rest))
        return entries


def _checked(source: Source, split: str) -> Iterator[Entry]:
    for entry in source.entries(split):
        if not entry.refused and not 0 <= entry.label < len(source.classes):
            raise DataError(f"{source.path}: {shown(entry.member)} is of none of the classes that were there before: "
                            "something has changed there; run again")
        yield entry


def _batches(entries: Iterator[Entry]) -> Iterator[pa.RecordBatch]:
    rows: list[Entry] = []
    for entry in entries:
        rows.append(entry)
        if len(rows) == ROWS_PER_BATCH:
            yield _batch(rows)
            rows = []
    if rows:
        yield _batch(rows)


def _batch(rows: list[Entry]) -> pa.RecordBatch:
    archives, members, *rest = zip(*rows)
    columns = [[os.fsencode(path) for path in archives], [os.fsencode(path) for path in members], *rest]
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, SCHEMA)], schema=SCHEMA)


def _hash(digest, column: pa.Array) -> None:
    for buffer in column.buffers():
        if buffer is not None:
            digest.update(buffer)
