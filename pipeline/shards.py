"""Arrow shards: uncompressed IPC files of images, memory-mapped when read.

A row is (image, label: int32, name: where the image came from). With the store "jpeg" an image is the bytes of a JPEG,
with "raw" its 256 x 256 x 3 bytes of pixels.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.manifest import IMAGE_SIZE, Manifest, ShardFile
from pipeline.storage import Storage

SCHEMA = pa.schema([("image", pa.large_binary()), ("label", pa.int32()), ("name", pa.string())])
RAW_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
RAW_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3
# Images found, of which a shard holds those that can be read. One shard is in memory while it is packed.
ROWS_PER_SHARD = {"jpeg": 4096, "raw": 1024}  # about 100 and 200 MB
ROWS_PER_BATCH = 128
Stamp = list[int]  # of a file: size, time of change in ns and inode; while it is the same, so is what the file holds


def write_shard(
    storage: Storage, name: str, images: Sequence[bytes], labels: Sequence[int], names: Sequence[str]
) -> ShardFile:
    """Write one shard, which appears whole or not at all."""
    with storage.create(name) as file:
        sink = _HashingSink(file)
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            for first in range(0, len(images), ROWS_PER_BATCH):
                rows = slice(first, first + ROWS_PER_BATCH)
                columns = [pa.array(column[rows], field.type) for column, field in zip((images, labels, names), SCHEMA)]
                writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    return ShardFile(name, len(images), sink.size, sink.digest.hexdigest())


class _HashingSink:
    """What Arrow needs of a file to write to, hashing as it goes."""

    closed = False

    def __init__(self, file: BinaryIO):
        self._file = file
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: pa.Buffer | bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


class ShardImages:
    """The images of one split, in stored order, as views of memory-mapped files (nothing is copied).

    `labels` is int32 [len]. `stored(i)` is a read-only uint8 view: image i's JPEG bytes where `store` is "jpeg", its
    pixels [256, 256, 3] in RGB where it is "raw".
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str):
        """Raises DataError for a split that is not there, and for shards that are not what the manifest counts."""
        if split not in manifest.splits:
            raise DataError(f"{folder}: has no {split} images, only {' and '.join(manifest.splits)}")
        self.store = manifest.store
        self._data: list[np.ndarray] = []  # one a record batch: all its images' bytes
        self._names: list[pa.Array] = []
        labels, starts, stops, first_row = [np.empty(0, np.int32)], [], [], [0]
        self._opened: dict[Path, Stamp | None] = {}
        for file in manifest.splits[split].files:
            path = Path(folder) / file.name
            self._opened[path] = stamp_of(path)
            for batch in (batch for batch in read_batches(path) if batch.num_rows):
                _, offsets, data = batch.column("image").buffers()
                offsets = np.frombuffer(offsets, np.int64, batch.num_rows + 1)
                if self.store == "raw" and (np.diff(offsets) != RAW_BYTES).any():
                    raise DataError(f"{path}: an image is not {RAW_BYTES} bytes; restore it or preprocess again")
                self._data.append(np.frombuffer(data, np.uint8))
                self._names.append(batch.column("name"))
                labels.append(batch.column("label").to_numpy())
                starts.append(offsets[:-1])
                stops.append(offsets[1:])
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
        self._starts, self._stops = np.concatenate(starts or [[]]), np.concatenate(stops or [[]])  # in their batch

    def __len__(self) -> int:
        return len(self.labels)

    def check_unchanged(self) -> None:
        """Raise DataError where a file has been written to, replaced or removed since it was opened here."""
        for path, stamp in self._opened.items():
            if stamp_of(path) != stamp:
                raise DataError(f"{path}: {'changed' if path.exists() else 'gone'} since it was opened: what was read "
                                "of it may be wrong; restore it or preprocess again, then go on from the last "
                                "checkpoint")

    def stored(self, index: int) -> np.ndarray:
        return self.stored_batch(np.array([index]))[0]

    def stored_batch(self, indices: np.ndarray) -> list[np.ndarray]:
        """Return the view of each image."""
        batches = np.searchsorted(self._first_row, indices, side="right") - 1
        places = zip(batches.tolist(), self._starts[indices].tolist(), self._stops[indices].tolist())
        views = [self._data[batch][start:stop] for batch, start, stop in places]
        return [view.reshape(RAW_SHAPE) for view in views] if self.store == "raw" else views

    def name(self, index: int) -> str:
        batch = int(np.searchsorted(self._first_row, index, side="right")) - 1
        return self._names[batch][int(index) - int(self._first_row[batch])].as_py()


def stamp_of(path: Path) -> Stamp | None:
    """Return a file's stamp; None where there is no file. OSError where nobody can say."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def read_batches(path: Path) -> list[pa.RecordBatch]:
    """Return the memory-mapped record batches of a shard; DataError where it is none."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("no plain file")
        file = pa.memory_map(str(path))
        reader = pa.ipc.open_file(file)
        if reader.schema != SCHEMA:
            raise pa.ArrowInvalid("other columns than image, label, name")
        file.seek(8)  # the messages one by one: the reader would unpack what is compressed
        _, *messages = pa.ipc.MessageReader.open_stream(file)
        if len(messages) != reader.num_record_batches:
            raise pa.ArrowInvalid("other batches than it lists")
        if any(message.type != "record batch" or not _is_plain(message) for message in messages):
            raise pa.ArrowInvalid("no uncompressed images")
        batches = [pa.ipc.read_record_batch(message, SCHEMA) for message in messages]
        for batch in batches:
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns):
                raise pa.ArrowInvalid("an empty field")
    except (OSError, ValueError, struct.error, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a readable shard ({reason}); restore it or preprocess again") from None
    return batches


def _is_plain(message: pa.ipc.Message) -> bool:
    """Whether a record batch lies in the file as it is used: a compressed one takes who knows how much memory to read.

    Its metadata is a FlatBuffer, which Arrow has found sound: of tables, each with the distance back to a list of where
    its fields are.
    """
    data = message.metadata.to_pybytes()

    def field(table: int, number: int) -> int | None:
        fields = table - struct.unpack_from("<i", data, table)[0]
        _, _, *places = struct.unpack_from(f"<{struct.unpack_from('<H', data, fields)[0] // 2}H", data, fields)
        return table + places[number] if number < len(places) and places[number] else None

    header = field(struct.unpack_from("<I", data)[0], 2)
    return header is not None and field(header + struct.unpack_from("<I", data, header)[0], 3) is None
