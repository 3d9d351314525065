"""Tar archives listed in place: what lies where. Nothing is unpacked, and memory does not grow with the members.

Headers are read here, not by Python's tarfile. That needs more than twice the time, takes an unreadable header for the
end, and follows what a damaged or hostile header says: into memory (the length of a name), in circles (negative sizes).
Known are POSIX.1-2001's and GNU's formats.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import DataError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
COMPRESSED_SUFFIXES = (".gz", ".tgz")
LARGEST_BYTES = 256 << 20  # of one image; larger ones are refused, so that they cannot cost memory
TOO_LARGE = "larger than 256 MiB"

_BLOCK, _REST_BYTES = 512, 1 << 20
_LONGEST_NAME_BYTES = 1 << 20
_LARGEST_SIZE = 1 << 60  # beyond it, offsets would overflow
_REGULAR, _LINKS, _WITHOUT_DATA = b"0\0" b"7", b"12", b"123456"
_GNU_NAME, _GNU_LINK_NAME, _GNU_SPARSE = b"L", b"K", b"S"
_PAX, _PAX_GLOBAL = b"xX", b"g"
_NO_END = "it ends before its end mark"


class Member(NamedTuple):
    """What an archive holds under a name, be it a file or not; directories are left out."""

    name: str  # undecodable bytes as surrogates
    offset: int  # of its data: bytes from the beginning of the (unpacked) archive, also if it lies in a tar in the tar
    size: int  # bytes
    refused: str  # why it is not to be read ("a link, not a file"), or ""


class Tar:
    """An open archive. A compressed one must be listed and read from front to back."""

    def __init__(self, path: Path, file: BinaryIO, compressed: bool):
        self.path, self._file, self._compressed = path, file, compressed

    def members(self, largest: float = LARGEST_BYTES) -> Iterator[Member]:
        """List all but directories, in the order of the archive; what has more than `largest` bytes is refused.

        Raises DataError where the archive is damaged or does not end with its end mark.
        """
        with reading(self.path):
            end = math.inf if self._compressed else self._file.seek(0, os.SEEK_END)
            yield from self._members(0, end, largest)
            while self._compressed and self._file.read(1 << 16):  # gzip compares its checksum at the very end
                pass

    def inside(self, outer: Member, largest: float = LARGEST_BYTES) -> Iterator[Member]:
        """List the members of `outer`, a tar in this tar, as `members` does; offsets are of this tar."""
        with reading(f"{self.path}: {shown(outer.name)} inside"):
            yield from self._members(outer.offset, outer.offset + outer.size, largest)

    def read(self, member: Member) -> bytes:
        with reading(self.path):
            return self._read(member.offset, member.size)

    def _members(self, offset: int, end: float, largest: float) -> Iterator[Member]:
        for_all: dict[bytes, bytes] = {}  # what global pax headers say of every member
        for_next: dict[bytes, bytes] = {}  # what pax and GNU headers say of the next one
        while True:
            if offset + _BLOCK > end:
                raise ValueError(_NO_END)
            header = self._read(offset, _BLOCK)
            offset += _BLOCK
            if not any(header):
                if for_next:
                    raise ValueError("ends after an extended header")
                self._check_rest(offset, end)
                return
            _check_sum(header)
            kind, size = header[156:157], _number(header[124:136])
            if kind in (_GNU_NAME, _GNU_LINK_NAME) or kind in _PAX or kind == _PAX_GLOBAL:
                if size > _LONGEST_NAME_BYTES or offset + size > end:
                    raise ValueError(f"an extended header of {size} bytes")
                data = self._read(offset, size)
                if kind == _GNU_NAME:
                    for_next[b"path"] = data.partition(b"\0")[0]
                elif kind != _GNU_LINK_NAME:
                    (for_all if kind == _PAX_GLOBAL else for_next).update(_pax_records(data))
                offset += _padded(size)
                continue
            if for_all or for_next:
                said = for_all | for_next
                for_next = {}
                name = said.get(b"path") or _ustar_name(header)
                size = _checked_size(int(said[b"size"])) if said.get(b"size") else size
                sparse = b"sparse" in said
            else:
                name, sparse = _ustar_name(header), False
            if kind == _GNU_SPARSE:
                sparse, more = True, header[482]
                while more:
                    more = self._read(offset, _BLOCK)[504]
                    offset += _BLOCK
            if kind != b"5" and not (kind in b"0\0" and name.endswith(b"/")):
                refused = _refusal(name, kind, sparse) or (TOO_LARGE if size > largest else "")
                yield Member(os.fsdecode(name), offset, size, refused)
            if kind not in _WITHOUT_DATA:
                offset += _padded(size)

    def _check_rest(self, offset: int, end: float) -> None:
        """Raise DataError where members follow the end mark, as in tars that were joined."""
        self._file.seek(offset)
        while offset < end and (block := self._file.read(int(min(_REST_BYTES, end - offset)))):
            for first in range(0, len(block) - _BLOCK + 1, _BLOCK) if any(block) else ():
                header = block[first : first + _BLOCK]
                if any(header):
                    if _is_header(header):
                        raise DataError(f"{self.path}: more files follow its end mark: unpack it with `tar -xif`, and "
                                        "give the folder")
                    return  # something else: tar ignores it too
            offset += len(block)

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise ValueError(_NO_END)
        return data


@contextmanager
def open_tar(path: Path) -> Iterator[Tar]:
    """Open a .tar, .tar.gz or .tgz; DataError where it cannot be read."""
    compressed = path.name.endswith(COMPRESSED_SUFFIXES)
    with reading(path):
        file = gzip.open(path) if compressed else open(path, "rb", buffering=0)
    with file:
        yield Tar(path, file, compressed)


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Turn every way in which a damaged archive fails into one DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (EOFError, zlib.error, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{name}: cannot be read ({error.strerror})") from None
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: truncated or damaged ({reason}): copy it again") from None


def shown(name: str) -> str:
    """Return a name from an archive as it may stand in a message of one line."""
    return (name if name.isprintable() else ascii(name)[1:-1])[:200]


def _check_sum(header: bytes) -> None:
    stated = _number(header[148:156])
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    # Some old programs took bytes for signed.
    if stated != total and stated != total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        raise ValueError("a header with a bad checksum")


def _is_header(block: bytes) -> bool:
    try:
        _check_sum(block)
    except ValueError:
        return False
    return True


def _number(field: bytes) -> int:
    if field[0] in (0o200, 0o377):  # GNU's, base 256; the latter negative
        return _checked_size(int.from_bytes(field[1:], "big") if field[0] == 0o200 else -1)
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise ValueError("a header with a number that is none")
    return int(digits or b"0", 8)


def _checked_size(size: int) -> int:
    if not 0 <= size < _LARGEST_SIZE:
        raise ValueError(f"a size of {size} bytes")
    return size


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield what records "<length> <key>=<value>\\n" say of a member's name and size, and "sparse" if it has holes."""
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 20)
        end = position + int(data[position:space]) if space > 0 else 0
        key, equals, value = data[space + 1 : end].partition(b"=")
        if not space < end <= len(data) or not equals or not value.endswith(b"\n"):
            raise ValueError("a damaged pax header")
        if key in (b"path", b"size"):
            yield key, value[:-1]
        elif key.startswith(b"GNU.sparse."):
            yield b"sparse", b""
            if key == b"GNU.sparse.name":
                yield b"path", value[:-1]
        position = end


def _refusal(name: bytes, kind: bytes, sparse: bool) -> str:
    if name.startswith(b"/") or (b".." in name and b".." in name.split(b"/")):
        return "its name leads out of the archive"
    if kind in _LINKS:
        return "a link, not a file"
    if kind not in _REGULAR or sparse:
        return "not a plain file"
    return ""
