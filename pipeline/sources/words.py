"""Text files that name classes and images, read line by line: they may be long, or not be what their names say."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.sources.archives import shown

# Lists of lines "wnid words", as published.
SYNSET_WORDS, WORDS, LOC_SYNSET_MAPPING = "synset_words.txt", "words.txt", "LOC_synset_mapping.txt"

_LONGEST_LINE_BYTES = 1 << 16


def read_words(path: Path, wanted: Collection[str] | None = None, data: bytes | None = None) -> dict[str, str]:
    """Return the words of each wnid that is in `wanted`, or of each in the list; other lines are passed over.

    The list is `data`, if given, which was found in an archive, at `path`.

    Raises DataError naming a line that has no words, is not UTF-8, or whose wnid was there before.
    """
    words_of_wnid: dict[str, str] = {}
    wanted_bytes = None if wanted is None else {wnid.encode() for wnid in wanted}
    for number, line in lines(path, data):
        first, *rest = line.split(None, 1)
        if wanted_bytes is not None and first not in wanted_bytes:
            continue
        wnid, words = text(first, path, number), text(b"".join(rest), path, number)
        if not words:
            raise DataError(f"{path}: line {number} names no words after {shown(wnid)}: restore the file")
        if wnid in words_of_wnid:
            raise DataError(f"{path}: line {number} names {shown(wnid)} again: restore the file")
        words_of_wnid[wnid] = words
    return words_of_wnid


def lines(path: Path, data: bytes | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line that is not blank, from 1, and the line without the white space around it.

    They are those of `data`, if given.

    Raises DataError where the file cannot be read or a line is longer than 64 KiB.
    """
    try:
        if data is None and not path.is_file():  # a pipe would block
            raise DataError(f"{path}: is missing, or not a plain file: restore it")
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE_BYTES):
                number += 1
                if len(line) == _LONGEST_LINE_BYTES:
                    raise DataError(f"{path}: line {number} is too long for a list: restore the file")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as some editors write it
                if line := line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def text(line: bytes, path: Path, number: int) -> str:
    """Return the line as text; DataError where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise DataError(f"{path}: line {number} is not UTF-8: restore the file") from None
