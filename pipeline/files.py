"""Files that survive a kill and a power cut, and their hashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import PreprocessError

MOST_AT_ONCE = 1 << 30  # bytes: no file that is read whole is nearly as long
TEMPORARY = ".tmp"  # how the name of a file ends that is not whole yet


@contextmanager
def creating(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; when the block ends, it is synced and takes the name `path`. Until then, and if it fails,
    what was there stays."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))  # which would be replaced: a device, a pipe
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    # A temporary name of its own: another process may be writing the same file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold a lock, which is let go of when the block ends, by a kill too. BlockingIOError where another holds it and
    `wait` is False."""
    with open(path, "a+") as file:  # for both, or a pipe of that name would be waited for
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextmanager
def scratch_file() -> Iterator[BinaryIO]:
    """Give a temporary file, which vanishes with the block. PreprocessError where it cannot be written."""
    place = os.environ.get("TMPDIR", "/tmp")
    try:
        place = tempfile.gettempdir()
        with tempfile.NamedTemporaryFile(prefix="alexnet-") as file:
            yield file
    except OSError as error:
        raise PreprocessError(f"{place}: cannot be written ({error.strerror}): free some space there, or name another "
                              "folder in TMPDIR; it goes on where it was") from None


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Give a file to read; OSError also where it is none, but a pipe, which would block, or a device."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        yield file


def read_plain(path: Path) -> bytes:
    """Return what a file holds; OSError as of open_plain, and where it is longer than MOST_AT_ONCE."""
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_AT_ONCE:
            raise OSError(errno.EFBIG, f"longer than {MOST_AT_ONCE:,} bytes", str(path))
        return file.read(MOST_AT_ONCE)


def write_durably(path: Path, data: bytes) -> None:
    with creating(path) as file:
        file.write(data)


def sync(path: Path) -> None:
    """Make what a file holds durable, or the renames inside a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open_plain(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
