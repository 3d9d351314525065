"""Folders listed: what each layout of loose files has in common."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.sources.archives import LARGEST_BYTES, TOO_LARGE, shown
from pipeline.sources.source import Entry

NO_CLASS = "in no class folder"
_IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, sorted, without hidden ones.

    Raises DataError for a name that cannot be printed, and for a link that leads nowhere: it may have been a class.
    """
    names = []
    for entry in _visible(folder):
        status = _status(entry)
        if status is None:
            raise DataError(f"{shown(entry.path)}: a link that leads nowhere: mend or remove it")
        if stat.S_ISDIR(status.st_mode):
            names.append(checked_class_name(entry.name, folder))
    return names


def checked_class_name(name: str, where: Path) -> str:
    """Return `name`; DataError where it cannot be printed on one line."""
    if not name.isprintable():  # surrogates, which stand for bytes that are not UTF-8, are not printable either
        raise DataError(f"{shown(str(where))}: the class {shown(name)} has a name that cannot be printed: rename it")
    return name


def files_in(root: Path, folder: str, label: int, below: bool = False) -> Iterator[Entry]:
    """List what lies in `folder` (relative to `root`), sorted by name, without hidden files and folders: directly in
    it, or with `below` at any depth, folder by folder; then a link to a folder is refused, for it may lead back.

    Raises DataError where it cannot be read.
    """
    folders = []
    for entry in _visible(root / folder):
        member = f"{folder}/{entry.name}"
        status = _status(entry)
        if status is None or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            yield Entry("", member, label, refused="not a plain file")  # a pipe or a device would block
        elif stat.S_ISREG(status.st_mode):
            refused = TOO_LARGE if status.st_size > LARGEST_BYTES else ""
            yield Entry("", member, label, size=status.st_size, refused=refused)
        elif below and entry.is_symlink():
            yield Entry("", member, label, refused="a link to a folder")
        elif below:
            folders.append(member)
    for member in folders:
        yield from files_in(root, member, label, below)


def loose_images(root: Path, folder: str) -> Iterator[Entry]:
    """List, as refused, what lies in `folder` itself and is called like an image: nothing says its class."""
    for entry in files_in(root, folder, -1):
        if is_image_name(entry.member):
            yield entry._replace(refused=NO_CLASS)


def is_image_name(name: str) -> bool:
    return name.lower().endswith(_IMAGE_SUFFIXES)


def first_few(names: Iterable[str]) -> str:
    """Return the first three names, sorted, as they may stand in a message."""
    ordered = sorted(names)
    return ", ".join(map(shown, ordered[:3])) + (", ..." if len(ordered) > 3 else "")


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{shown(str(folder))}: cannot be read ({error.strerror})") from None


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return what the entry, or the file that it links to, is; None for a link that leads nowhere."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in _LEADS_NOWHERE and entry.is_symlink():
            return None
        if error.errno == errno.ENOENT:
            raise DataError(f"{shown(entry.path)}: vanished while its folder was listed: run again") from None
        raise DataError(f"{shown(entry.path)}: cannot be read ({error.strerror})") from None
