"""Arrow shards: uncompressed IPC files of encoded images, memory-mapped when read.

A row is (image: JPEG bytes, label: int32, name: where the image came from).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.manifest import Manifest, ShardFile, sha256_of, sync_folder

SCHEMA = pa.schema([("image", pa.large_binary()), ("label", pa.int32()), ("name", pa.string())])
ROWS_PER_BATCH = 512
ROWS_PER_SHARD = 4096


class ShardWriter:
    """Write one split, row by row, into files of ROWS_PER_SHARD rows; each appears whole or not at all."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = Path(folder), split
        self.files: list[ShardFile] = []
        self._rows: list[tuple[bytes, int, str]] = []
        self._rows_in_file = 0
        self._writer = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of a file that was not finished; it keeps its temporary name."""
        if self._writer is not None:
            self._sink.close()

    def add(self, image: bytes, label: int, name: str) -> None:
        self._rows.append((image, label, name))
        if len(self._rows) == ROWS_PER_BATCH:
            self._write_batch()
        if self._rows_in_file == ROWS_PER_SHARD:
            self._finish_file()

    def close(self) -> list[ShardFile]:
        """Finish the last file; return all of them, in the order of their rows."""
        if self._rows:
            self._write_batch()
        if self._writer is not None:
            self._finish_file()
        return self.files

    def _write_batch(self) -> None:
        if self._writer is None:
            self._path = self.folder / f"{self.split}-{len(self.files):05d}.arrow"
            self._temporary = self._path.with_name(self._path.name + ".tmp")
            self._sink = open(self._temporary, "wb")
            self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        columns = [pa.array(column, field.type) for column, field in zip(zip(*self._rows), SCHEMA)]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._rows_in_file += len(self._rows)
        self._rows.clear()

    def _finish_file(self) -> None:
        self._writer.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        size, digest = self._temporary.stat().st_size, sha256_of(self._temporary)
        os.replace(self._temporary, self._path)
        sync_folder(self.folder)
        self.files.append(ShardFile(self._path.name, self._rows_in_file, size, digest))
        self._writer, self._rows_in_file = None, 0


class ShardImages:
    """The images of one split, in stored order, as views of memory-mapped files (nothing is copied).

    `labels` is int32 [len]; `encoded(i)` is a read-only uint8 view of image i's JPEG bytes.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str):
        self._data: list[np.ndarray] = []  # one a record batch: all its images' bytes
        self._offsets: list[np.ndarray] = []  # int64 [rows + 1]
        self._names: list[pa.Array] = []
        labels, first_row = [np.empty(0, np.int32)], [0]
        for file in manifest.splits[split].files:
            path = Path(folder) / file.name
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(path)))
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
                if reader.schema != SCHEMA:
                    raise pa.ArrowInvalid("other columns than image, label, name")
                for batch in batches:
                    batch.validate(full=True)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path}: not a readable shard ({error}); restore it or preprocess again") from None
            for batch in batches:
                _, offsets, data = batch.column("image").buffers()
                self._offsets.append(np.frombuffer(offsets, np.int64)[: batch.num_rows + 1])
                self._data.append(np.frombuffer(data, np.uint8))
                self._names.append(batch.column("name"))
                labels.append(batch.column("label").to_numpy())
                first_row.append(first_row[-1] + batch.num_rows)
        self.labels = np.concatenate(labels)
        self._first_row = np.array(first_row)
        if len(self.labels) != manifest.splits[split].images:
            raise DataError(f"{folder}: {split} holds {len(self.labels)} images, its manifest says "
                            f"{manifest.splits[split].images}; restore it or preprocess again")
        counts = manifest.splits[split].class_counts
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(counts) or (
            np.bincount(self.labels, minlength=len(counts)).tolist() != counts
        ):
            raise DataError(f"{folder}: the labels of {split} are not those that its manifest counts; "
                            "restore it or preprocess again")

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> np.ndarray:
        batch, row = self._locate(index)
        start, stop = self._offsets[batch][row : row + 2]
        return self._data[batch][start:stop]

    def name(self, index: int) -> str:
        batch, row = self._locate(index)
        return self._names[batch][row].as_py()

    def _locate(self, index: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._first_row, index, side="right")) - 1
        return batch, int(index) - int(self._first_row[batch])
