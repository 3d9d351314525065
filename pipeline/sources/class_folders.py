"""One folder a class: train/<wnid>/<image> and val/<wnid>/<image>, as folders or inside one tar archive.

This is how ImageFolder and its kin want ImageNet, and how its subsets are published.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError
from pipeline.manifest import SPLITS, SynsetClass
from pipeline.sources.archives import entries, open_tar
from pipeline.sources.source import SourceImage

WORDS_FILES = ("synset_words.txt", "words.txt")  # lines "wnid words"
ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tar.gz")


class ClassFolders:
    """A folder with train/ and val/. Images come class by class, sorted by wnid, then by file name."""

    layout = "class-folders"

    @staticmethod
    def matches(path: Path) -> bool:
        return any((path / split).is_dir() for split in SPLITS)

    def __init__(self, path: Path):
        """Raises DataError where a split is missing or val has a class that train has not."""
        self.path = path
        wnids = {split: [entry.name for entry in self._visible(path / split) if entry.is_dir()]
                 for split in SPLITS if (path / split).is_dir()}
        self.classes = _classes(path, wnids, _read_words(path))
        self._wnids = wnids

    def count(self, split: str) -> int:
        return sum(1 for wnid in self._wnids[split] for _ in self._files(self.path / split / wnid))

    def read(self, split: str) -> Iterator[SourceImage]:
        label_of_wnid = {c.wnid: label for label, c in enumerate(self.classes)}
        for wnid in self._wnids[split]:
            for entry in self._files(self.path / split / wnid):
                name, label = f"{split}/{wnid}/{entry.name}", label_of_wnid[wnid]
                if not entry.is_file():  # a pipe or a device would block, a link may lead nowhere
                    yield SourceImage(name, label, b"", "not a plain file")
                    continue
                try:
                    data = Path(entry.path).read_bytes()
                except OSError as error:
                    raise DataError(f"{entry.path}: cannot be read ({error.strerror}): mend or remove it") from None
                yield SourceImage(name, label, data)

    def _files(self, folder: Path) -> list[os.DirEntry]:
        return [entry for entry in self._visible(folder) if not entry.is_dir()]

    @staticmethod
    def _visible(folder: Path) -> list[os.DirEntry]:
        try:
            with os.scandir(folder) as found:
                return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror})") from None


class ClassFolderArchive:
    """A tar archive (it may be compressed) of such folders, at any depth below its top.

    Images come in the order of the archive. Opening reads all headers once; each split reads them again.
    """

    layout = "class-folders"

    @staticmethod
    def matches(path: Path) -> bool:
        return path.is_file() and path.name.endswith(ARCHIVE_SUFFIXES)

    def __init__(self, path: Path):
        """Raises DataError where it is damaged, a split is missing or val has a class that train has not."""
        self.path = path
        self._counts = {split: Counter() for split in SPLITS}
        tops = set()
        with open_tar(path) as tar:
            for member, refused in entries(tar):
                if not refused and (place := _place(member.name)) is not None:
                    top, split, wnid = place
                    tops.add(top)
                    self._counts[split][wnid] += 1
        if len(tops) > 1:
            first, second = sorted(tops)[:2]
            raise DataError(f"{path}: holds more than one data set ({first}/ and {second}/): unpack it and "
                            "give the folder of one")
        self.classes = _classes(path, {split: found for split, found in self._counts.items() if found}, {})

    def count(self, split: str) -> int:
        return sum(self._counts[split].values())

    def read(self, split: str) -> Iterator[SourceImage]:
        label_of_wnid = {c.wnid: label for label, c in enumerate(self.classes)}
        with open_tar(self.path) as tar:
            for member, refused in entries(tar):
                place = _place(member.name)
                if refused:  # one that belongs to no split is reported with the first
                    if split == (place[1] if place else SPLITS[0]):
                        yield SourceImage(member.name, label_of_wnid.get(place[2], -1) if place else -1, b"", refused)
                elif place and place[1] == split:
                    yield SourceImage(member.name, label_of_wnid[place[2]], tar.extractfile(member).read())


def _place(name: str) -> tuple[str, str, str] | None:
    """Split [top/]train/<wnid>/<file> into (top, "train", wnid); None for other and for hidden files."""
    *top, split, wnid, file = ("", "", "", *PurePosixPath(name).parts)
    if split not in SPLITS or file.startswith(".") or wnid.startswith("."):
        return None
    return "/".join(filter(None, top)), split, wnid


def _classes(path: Path, wnids: dict[str, Iterable[str]], words: dict[str, str]) -> list[SynsetClass]:
    for split in SPLITS:
        if not wnids.get(split):
            raise DataError(f"{path}: holds no {split}/<wnid>/ folders with images; both train/ and val/ are needed")
    unknown = sorted(set(wnids["val"]) - set(wnids["train"]))
    if unknown:
        raise DataError(f"{path}: {len(unknown)} classes of val/ are not in train/ ({unknown[0]}, ...): "
                        "complete train/ or remove them")
    return [SynsetClass(wnid, words.get(wnid, "")) for wnid in sorted(wnids["train"])]


def _read_words(folder: Path) -> dict[str, str]:
    for name in WORDS_FILES:
        try:
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{folder / name}: cannot be read ({error.strerror})") from None
        return {wnid: words.strip() for wnid, _, words in (line.replace("\t", " ").partition(" ") for line in lines)}
    return {}
