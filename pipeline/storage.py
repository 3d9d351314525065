"""Where shards are written: a local folder, or a place in an object store (s3://, gs:// through pyarrow.fs).

A file appears under its name when it is whole. An upload that fails removes what it has left.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import DataError
from pipeline.files import TEMPORARY, creating, read_plain, scratch_file

COPY_BYTES = 8 << 20


class Storage(Protocol):
    """Names are relative, with "/" between folders. Every method may raise OSError."""

    location: str  # as the user gave it, for messages

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the bytes of every file by name; folders end with "/". Nothing where the location is not there."""

    def read(self, name: str) -> bytes: ...

    def create(self, name: str):
        """Return a context manager that gives a binary file; it replaces `name` when the block ends without error."""

    def remove_folder(self, name: str) -> None:
        """Remove all that is in the folder; nothing happens where there is none."""

    def remove_temporary(self, folder: str = "") -> None:
        """Remove what killed processes left half written. None may be writing."""


def open_storage(location: str | Path) -> Storage:
    """Raises DataError for a location that cannot be one."""
    if "://" not in str(location):
        return LocalStorage(Path(location))
    return ObjectStorage(str(location))


class LocalStorage:
    def __init__(self, folder: Path):
        self.folder, self.location = folder, str(folder)

    def sizes(self, folder: str = "") -> dict[str, int]:
        found = {}
        with suppress(FileNotFoundError), os.scandir(self.folder / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                with suppress(FileNotFoundError):  # another process has just renamed it
                    if entry.is_dir(follow_symlinks=False):
                        found[f"{name}/"] = 0
                    else:
                        found[name] = entry.stat(follow_symlinks=False).st_size
        return found

    def read(self, name: str) -> bytes:
        return read_plain(self.folder / name)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with creating(path) as file:
            yield file

    def remove_folder(self, name: str) -> None:
        for _ in range(5):  # another process may add or remove a file at this moment
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if not (self.folder / name).exists():
                return
        shutil.rmtree(self.folder / name)

    def remove_temporary(self, folder: str = "") -> None:
        for name in self.sizes(folder):
            if name.endswith(TEMPORARY):
                (self.folder / name).unlink(missing_ok=True)


class ObjectStorage:
    """Credentials, region and endpoint come from the environment, as the store's own tools read them, or stand in the
    URI (`s3://bucket/folder?endpoint_override=host:port&scheme=http`)."""

    def __init__(self, location: str):
        self.location = re.sub("//[^/]*@", "//", location)  # without a key and a secret
        try:
            self._files, self._base = fs.FileSystem.from_uri(location)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise DataError(f"{self.location}: not a usable location ({_first_line(error)})") from None
        if isinstance(self._files, fs.LocalFileSystem):
            raise DataError(f"{self.location}: give a local folder by its path, {self._base}")
        self._base = self._base.rstrip("/")
        if not self._base:
            raise DataError(f"{self.location}: names no folder; give one, like s3://bucket/folder")

    def sizes(self, folder: str = "") -> dict[str, int]:
        base = f"{self._base}/{folder}".rstrip("/")
        found = {}
        for info in self._files.get_file_info(fs.FileSelector(base, allow_not_found=True)):
            name = info.path[len(self._base) + 1 :]
            if info.type == fs.FileType.Directory:
                found[f"{name}/"] = 0
            else:
                found[name] = info.size
        return found

    def read(self, name: str) -> bytes:
        with self._files.open_input_stream(f"{self._base}/{name}") as file:
            return file.read()

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        # To a local file first: what is uploaded appears under its name when the upload is closed, whole or not.
        failure = None
        with scratch_file() as file:
            yield file
            file.flush()
            file.seek(0)
            try:
                with self._files.open_output_stream(f"{self._base}/{name}") as upload:
                    shutil.copyfileobj(file, upload, COPY_BYTES)
            except BaseException as error:
                with suppress(OSError):
                    self._files.delete_file(f"{self._base}/{name}")
                if not isinstance(error, OSError):
                    raise
                failure = error
        if failure is not None:  # not the scratch file's
            raise failure

    def remove_folder(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._files.delete_dir(f"{self._base}/{name}")

    def remove_temporary(self, folder: str = "") -> None:
        """Uploads of killed processes are invisible; the store's own life-cycle rules remove them."""

    def download(self, name: str, path: Path) -> None:
        """Copy to a local file."""
        with self._files.open_input_stream(f"{self._base}/{name}") as file, open(path, "wb") as copy:
            shutil.copyfileobj(file, copy, COPY_BYTES)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

