"""Tar archives read in place: nothing is unpacked, and no table of members grows in memory."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipeline.errors import DataError


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Turn every way in which a damaged archive fails into one DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{name}: cannot be read ({error.strerror})") from None
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: truncated or damaged ({reason}): copy it again") from None


@contextmanager
def open_tar(name: str | Path, file: BinaryIO | None = None) -> Iterator[tarfile.TarFile]:
    """Open the archive at path `name`, or the one that `file` holds; DataError where it cannot be read."""
    mode = "r:gz" if str(name).endswith((".gz", ".tgz")) else "r:"
    with reading(name):
        with tarfile.open(name if file is None else None, mode, fileobj=file) as tar:
            yield tar


def entries(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield (member, why it is refused or "") for all but directories, in the order of the archive.

    Raises tarfile.ReadError where the archive does not end with its end mark.
    """
    while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile remembers each: gigabytes for a million images
        if not member.isdir():
            yield member, _refusal(member)
    # tarfile takes a file cut between two members, and an unreadable header, for the end of the archive
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end mark")
    while tar.fileobj.read(1 << 16):  # gzip compares its checksum at the very end
        pass


def _refusal(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "its name leads out of the archive"
    if member.issym() or member.islnk():
        return "a link, not a file"
    if not member.isreg() or member.issparse():
        return "not a plain file"
    return ""
