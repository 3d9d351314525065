"""ImageNet as a whole (fall 2011, winter 2021): one <wnid>.tar a class, in a folder or in one tar archive."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError
from pipeline.manifest import SynsetClass
from pipeline.sources.archives import LARGEST_BYTES, TAR_SUFFIXES, Member, open_tar, shown
from pipeline.sources.source import Entry
from pipeline.sources.words import WORDS, read_words

MEMBERS_LOOKED_AT = 64  # of an archive, for a class tar

_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_IMAGE = re.compile(r"(n\d{8})_")


class SynsetTars:
    """Only training images: the publishers split nothing. Words come from words.txt, inside the archive or beside it.

    A tar that holds no image that can be read is no class. Files that are not named like a class tar are passed over.
    Opening looks into every class tar; for that, a compressed archive is unpacked once, without keeping anything.
    """

    layout = "synset-tars"
    LOOKS_LIKE = "n########.tar files in a folder or in one tar"
    splits = ("train",)
    missing = ()

    @staticmethod
    def matches(path: Path) -> bool:
        """Raises DataError where `path` is a damaged tar."""
        if path.is_dir():
            with os.scandir(path) as found:
                return any(_wnid(entry.name) and entry.is_file() for entry in found)
        if not path.is_file() or not path.name.endswith(TAR_SUFFIXES):
            return False
        with open_tar(path) as tar:
            return any(_wnid(member.name) for member in islice(tar.members(math.inf), MEMBERS_LOOKED_AT))

    def __init__(self, path: Path):
        """Raises DataError where a tar is damaged, there twice, or none holds an image."""
        self.path = path
        self._names: list[str] | None = None  # of the tars in the folder
        self.root = path.parent if path.is_file() else path
        beside = self.root / WORDS
        self.archives = (beside,) if beside.is_file() else ()
        inside = None  # the archive's own list of words
        if path.is_file():
            self.archives += (path,)
            wnids, inside = self._look_inside()
        else:
            with os.scandir(path) as found:
                self._names = sorted(entry.name for entry in found if _wnid(entry.name) and entry.is_file())
            self.archives += tuple(path / name for name in self._names)
            wnids = []
            for name in self._names:
                with open_tar(path / name) as tar:
                    if _any_image(tar.members()):
                        wnids.append(_wnid(name))
        if not wnids:
            raise DataError(f"{path}: no class tar holds an image")
        words_of_wnid = {}
        if inside is not None:
            words_of_wnid = read_words(path / WORDS, wnids, inside)
        elif beside.is_file():
            words_of_wnid = read_words(beside, wnids)
        self.classes = [SynsetClass(wnid, words_of_wnid.get(wnid, "")) for wnid in sorted(wnids)]
        self._label_of_wnid = {c.wnid: label for label, c in enumerate(self.classes)}

    def entries(self, split: str) -> Iterator[Entry]:
        """List the images class tar by class tar, in the order of the archive or of the tars' names."""
        if self._names is None:
            with open_tar(self.path) as tar:
                for member in tar.members(math.inf):
                    if not (wnid := _wnid(member.name)):
                        continue
                    if member.refused:
                        yield Entry(self.path.name, member.name, -1, refused=member.refused)
                    else:
                        yield from class_tar_entries(tar.inside(member), self.path, wnid, self._label(wnid), f"{wnid}/")
            return
        for name in self._names:
            with open_tar(self.path / name) as tar:
                wnid = _wnid(name)
                yield from class_tar_entries(tar.members(), self.path / name, wnid, self._label(wnid))

    def _look_inside(self) -> tuple[list[str], bytes | None]:
        """Return the wnids that have an image, and the list of words, if the archive holds one."""
        holds_image: dict[str, bool] = {}
        words = None
        with open_tar(self.path) as tar:
            for member in tar.members(math.inf):
                if member.refused:
                    continue
                if PurePosixPath(member.name).name == WORDS and member.size <= LARGEST_BYTES:
                    words = tar.read(member)
                elif wnid := _wnid(member.name):
                    if wnid in holds_image:
                        raise DataError(f"{self.path}: holds {wnid}.tar twice: copy it again")
                    holds_image[wnid] = _any_image(tar.inside(member))
        return [wnid for wnid, holds in holds_image.items() if holds], words

    def _label(self, wnid: str) -> int:
        return self._label_of_wnid.get(wnid, -1)  # of an empty tar, or of one whose members are all refused


def class_tar_entries(
    members: Iterable[Member], archive: Path, wnid: str, label: int, prefix: str = ""
) -> Iterator[Entry]:
    """List the images of one class: what its tar, which is `archive` or lies in it, holds; `prefix` goes before names.

    Raises DataError for an image whose name begins with the wnid of another class.
    """
    beginning = f"{wnid}_"
    for member in members:
        name = member.name.rpartition("/")[2]
        if not name.startswith(beginning) and (match := _IMAGE.match(name)):
            raise DataError(f"{archive}: the tar of {wnid} holds {shown(member.name)}, an image of {match[1]}: "
                            "use the archive as published")
        yield Entry(archive.name, prefix + member.name, label, member.offset, member.size, member.refused)


def _wnid(name: str) -> str:
    """Return the class whose tar a file of this name is, or ""."""
    match = _CLASS_TAR.fullmatch(PurePosixPath(name).name)
    return match[1] if match else ""


def _any_image(members: Iterable[Member]) -> bool:
    return any(not member.refused for member in members)
