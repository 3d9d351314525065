"""WebDataset: tars of samples, each consecutive members <key>.jpg and <key>.cls, read where they lie."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path

from pipeline.errors import DataError
from pipeline.sources.archives import TAR_SUFFIXES, Member, Tar, open_tar, shown
from pipeline.sources.numbered import UNLABELLED, NumberedSource, files_by_split
from pipeline.sources.source import Entry
from pipeline.sources.words import LOC_SYNSET_MAPPING, SYNSET_WORDS, lines, read_words, text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
LABEL_EXTENSION = "cls"
LISTS_OF_WORDS = (SYNSET_WORDS, LOC_SYNSET_MAPPING)  # in the order of the labels, or longer than the list of them
CLASS_NAMES = ("classnames.txt", "imagenet_classes.txt")  # a name a line, in the order of the labels
MEMBERS_LOOKED_AT = 64  # of a tar, for a sample

_LONGEST_LABEL_BYTES = 64
_NUMBER = re.compile(rb"-?[0-9]{1,18}")
_WNID = re.compile(r"n[0-9]{8}")


class WebDataset(NumberedSource):
    """Images come tar by tar, sorted by path, in the order of the members; other members of samples are passed over.

    Opening reads all headers and labels.
    """

    layout = "webdataset"
    LOOKS_LIKE = "a folder of tars with samples KEY.jpg and KEY.cls, *train*.tar and *val*.tar or in train/ and val/"

    @staticmethod
    def matches(path: Path) -> bool:
        """Raises DataError where a tar is damaged, none of the others holds samples, and there is no train/."""
        damaged = None
        for file in chain(*files_by_split((path,), TAR_SUFFIXES).values()) if path.is_dir() else ():
            try:
                with open_tar(file) as tar:
                    members = islice(tar.members(math.inf), MEMBERS_LOOKED_AT)
                    extensions = {_key_and_extension(member.name)[1] for member in members}
            except DataError as error:
                damaged = damaged or error
                continue
            if LABEL_EXTENSION in extensions and not extensions.isdisjoint(IMAGE_EXTENSIONS):
                return True
        if damaged and not (path / "train").is_dir():
            raise damaged
        return False

    def __init__(self, path: Path):
        """Raises DataError naming a tar or a list of classes that is damaged, and a sample that is not whole or whose
        label is wrong."""
        self.path = self.root = path
        self._files = files_by_split((path,), TAR_SUFFIXES)
        self.archives = tuple(chain(*self._files.values()))
        names, words_of_wnid = None, None
        listed = [path / name for name in (*LISTS_OF_WORDS, *CLASS_NAMES) if (path / name).is_file()][:1]
        for file in listed:
            if file.name in LISTS_OF_WORDS:
                words_of_wnid = {wnid: words for wnid, words in read_words(file).items() if _WNID.fullmatch(wnid)}
            else:
                names = _read_names(file) or None
        self.archives += tuple(listed)
        self._number_classes(names, listed[0].name if listed else "", words_of_wnid)

    def _listed(self, split: str) -> Iterator[Entry]:
        for path in self._files[split]:
            archive = path.relative_to(self.root).as_posix()
            with open_tar(path) as tar:
                for key, members in groupby(tar.members(), lambda member: _key_and_extension(member.name)[0]):
                    if key and (sample := _sample(tar, key, members)):
                        image, number = sample
                        yield Entry(archive, image.name, number, image.offset, image.size, image.refused)


def _sample(tar: Tar, key: str, members: Iterable[Member]) -> tuple[Member, int] | None:
    """Return the image among the members of one key, and its number; None where there is neither."""
    place = f"{tar.path}: {shown(key)}"
    image = number = None
    for member in members:
        extension = _key_and_extension(member.name)[1]
        if extension in IMAGE_EXTENSIONS:
            if image is not None:
                raise DataError(f"{place}: has two images: keep one image a key")
            image = member
        elif extension == LABEL_EXTENSION:
            if number is not None:
                raise DataError(f"{place}: has two .cls: copy the tar again")
            text = b"" if member.refused or member.size > _LONGEST_LABEL_BYTES else tar.read(member).strip()
            if not _NUMBER.fullmatch(text):
                raise DataError(f"{place}: its .cls is not the number of a class: use the tar as published")
            number = int(text)
    if image is None and number is not None:
        raise DataError(f"{place}: has a .cls, but no image next to it: use the tar as published")
    if image is not None and number is None:
        if not image.refused:
            raise DataError(f"{place}: has an image, but no .cls next to it: use the tar as published")
        number = UNLABELLED
    return None if image is None else (image, number)


def _read_names(path: Path) -> list[str]:
    """Return the name on each line; DataError for a blank one before the last, which would shift those behind it."""
    names: list[str] = []
    for number, line in lines(path):
        if number > len(names) + 1:
            raise DataError(f"{path}: line {len(names) + 1} is blank, but each names a class: restore the file")
        names.append(text(line, path, number))
    return names


def _key_and_extension(name: str) -> tuple[str, str]:
    """Split at the first dot of the base name; the key is "" where that begins with a dot or has none."""
    folder, slash, base = name.rpartition("/")
    base, dot, extension = base.partition(".")
    return (folder + slash + base, extension.lower()) if base and dot else ("", "")
