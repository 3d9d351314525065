"""Parquet files as Hugging Face's `datasets` writes them: a row an image, read where they lie."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pipeline.errors import DataError
from pipeline.sources.archives import shown
from pipeline.sources.numbered import UNLABELLED, NumberedSource, files_by_split
from pipeline.sources.reading import PARQUET_SUFFIX
from pipeline.sources.source import Entry

IMAGE, LABEL = "image", "label"  # columns; the former has the fields "bytes" and "path"
METADATA = b"huggingface"  # JSON in the schema: the classes' names

_BATCH_ROWS = 1024
_PART = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})")


class HuggingFaceParquet(NumberedSource):
    """Images come file by file, sorted by path, in the order of the rows.

    Opening reads the labels and the images' names, never the images.
    """

    layout = "hugging-face-parquet"
    LOOKS_LIKE = f"a folder with train-*{PARQUET_SUFFIX} and validation-*{PARQUET_SUFFIX}, or with data/ that has them"

    @staticmethod
    def matches(path: Path) -> bool:
        return path.is_dir() and any(_files(path).values())

    def __init__(self, path: Path):
        """Raises DataError naming a file that is damaged or has other columns, and a row whose label is wrong."""
        self.path = self.root = path
        self._files = _files(path)
        self.archives = tuple(file for files in self._files.values() for file in files)
        names, names_file = None, ""
        for file in self.archives:
            with _open(file) as parquet:
                found = _class_names(parquet.schema_arrow, file)
            if found is not None and names is not None and found != names:
                raise DataError(f"{file}: its class names are not those of {names_file}: use files that belong "
                                "together")
            if names is None and found is not None:
                names, names_file = found, file.name
        self._number_classes(names, names_file)
        for files in self._files.values():
            self.missing += tuple(_missing_parts(files))

    def _listed(self, split: str) -> Iterator[Entry]:
        block = -1
        for path in self._files[split]:
            archive, row = path.relative_to(self.root).as_posix(), 0
            with _open(path) as file:
                for group in range(file.num_row_groups):
                    block += 1
                    for batch in file.iter_batches(_BATCH_ROWS, [group], [LABEL, f"{IMAGE}.path"], use_threads=False):
                        images = batch.column(IMAGE)
                        paths = pyarrow.compute.struct_field(images, [0]).to_pylist()
                        for name, label, there in zip(paths, batch.column(LABEL).to_pylist(),
                                                      images.is_valid().to_pylist()):
                            yield Entry(archive, name or f"row {row}", UNLABELLED if label is None else label, row,
                                        refused="" if there else "null, not an image", block=block)
                            row += 1


def _files(path: Path) -> dict[str, list[Path]]:
    return files_by_split((path, path / "data"), (PARQUET_SUFFIX,))


@contextmanager
def _open(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a file that has the columns; every way in which a damaged one fails is one DataError that names it."""
    try:
        if not path.is_file():  # a pipe would block
            raise DataError(f"{path}: no plain file any more: restore it and run again")
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, path)
            yield file
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        reason = shown(" ".join(str(error).split()))
        raise DataError(f"{path}: truncated or damaged ({reason}): download it again") from None


def _check_columns(schema: pa.Schema, path: Path) -> None:
    """Raises DataError where the columns are not image: struct<bytes: binary, path: string> and label: integer."""
    types = {field.name: field.type for field in schema}
    image, label = types.get(IMAGE), types.get(LABEL)
    fields = {field.name: field.type for field in image} if image is not None and pa.types.is_struct(image) else {}
    binary, string = fields.get("bytes", pa.null()), fields.get("path")
    if not (pa.types.is_binary(binary) or pa.types.is_large_binary(binary)) or string is None or not (
            pa.types.is_string(string) or pa.types.is_large_string(string) or pa.types.is_null(string)):
        wrong = f"no column {IMAGE} of bytes and path"
    elif label is None or not pa.types.is_integer(label):
        wrong = f"no column {LABEL} of integers"
    else:
        return
    has = shown(", ".join(f"{name}: {type}" for name, type in types.items()))
    raise DataError(f"{path}: has {wrong} (it has {has}): use a data set of labelled images")


def _class_names(schema: pa.Schema, path: Path) -> list[str] | None:
    """Return the classes' names in the order of their numbers, None where the schema has none."""
    text = (schema.metadata or {}).get(METADATA)
    if text is None:
        return None
    try:
        feature = json.loads(text)["info"]["features"][LABEL]
        dtype = feature.get("dtype")
        # Older versions wrote what is today found only in dataset cards.
        feature = feature.get("class_label") or (dtype["class_label"] if isinstance(dtype, dict) else feature)
        names = feature.get("names")
        if isinstance(names, dict):
            names = [names[str(number)] for number in range(len(names))]
        if names is not None and not (names and isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise TypeError("names that are none")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: its metadata of {METADATA.decode()} cannot be read ({type(error).__name__}: "
                        f"{shown(' '.join(str(error).split()))}): download it again") from None
    return names


def _missing_parts(files: list[Path]) -> Iterator[str]:
    """Yield a line for each set of files, <name>-<number>-of-<count>, that is not whole."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _PART.match(file.name):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, count), found in numbers.items():
        if len(found) < count:
            first = next(number for number in range(count) if number not in found)
            yield f"{count - len(found)} of the {count} files {name}-*-of-{count:05d}*, the first of them {first:05d}"
