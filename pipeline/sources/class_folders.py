"""One folder a class: train/<wnid>/<image> and val/<wnid>/<image>, as folders or inside one tar archive.

This is how ImageFolder and its kin want ImageNet, and how its subsets are published.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from pipeline.errors import DataError
from pipeline.manifest import SPLITS, SynsetClass
from pipeline.sources.archives import TAR_SUFFIXES, TOO_LARGE, Member, open_tar, shown
from pipeline.sources.folders import (
    NO_CLASS,
    checked_class_name,
    class_folders,
    files_in,
    first_few,
    is_image_name,
    loose_images,
)
from pipeline.sources.source import Entry
from pipeline.sources.words import LOC_SYNSET_MAPPING, SYNSET_WORDS, WORDS, read_words

SPLIT_OF_FOLDER = {"train": "train", "val": "val", "validation": "val", "test": "test"}

_NO_TEST_CLASSES = "the test images' classes: they are left out"
_UNSORTED_VAL = "sort its images into folders named like those of train/, or remove it"


class ClassFolders:
    """A folder with train/ and, it may be, val/ (or validation/) and test/.

    Images come class by class, sorted by wnid, then folder by folder, then by file name. Links to files and to class
    folders are followed. A list of words beside train/ is read, if there is one.
    """

    layout = "class-folders"
    LOOKS_LIKE = "a folder with train/CLASS/* and val/CLASS/*"

    @staticmethod
    def matches(path: Path) -> bool:
        return any((path / name).is_dir() for name, split in SPLIT_OF_FOLDER.items() if split != "test")

    def __init__(self, path: Path):
        """Raises DataError where train has no class, or another split has a class that train has not."""
        self.path = self.root = path
        self._wnids: dict[str, list[str]] = {}  # by split
        self._folders: dict[str, str] = {}  # by split
        self.missing: tuple[str, ...] = ()
        for folder, split in SPLIT_OF_FOLDER.items():
            if not (path / folder).is_dir():
                continue
            if split in self._folders:
                raise DataError(f"{path}: holds both {self._folders[split]}/ and {folder}/: remove one")
            wnids = class_folders(path / folder)
            if wnids:
                self._wnids[split], self._folders[split] = wnids, folder
            elif split == "val":
                raise DataError(f"{path / folder}: holds no class folders: {_UNSORTED_VAL}")
            elif split == "test":
                self.missing = (_NO_TEST_CLASSES,)
        if "train" not in self._wnids:
            raise DataError(f"{path}: holds no train/<class>/ folders with images: add them")
        self.splits = _splits(path, self._wnids)
        lists = [path / name for name in (SYNSET_WORDS, WORDS, LOC_SYNSET_MAPPING) if (path / name).is_file()][:1]
        self.archives = tuple(lists)
        wnids = self._wnids["train"]
        words = read_words(lists[0], wnids) if lists else {}
        self.classes = [SynsetClass(wnid, words.get(wnid, "")) for wnid in wnids]

    def entries(self, split: str) -> Iterator[Entry]:
        label_of_wnid = {wnid: label for label, wnid in enumerate(self._wnids["train"])}
        yield from loose_images(self.root, self._folders[split])
        for wnid in self._wnids[split]:
            yield from files_in(self.root, f"{self._folders[split]}/{wnid}", label_of_wnid[wnid], below=True)


class ClassFolderArchive:
    """A tar archive (it may be compressed) of such folders, at any depth below its top.

    Images come in the order of the archive. Opening reads all headers once; each split reads them again.
    """

    layout = "class-folders"
    LOOKS_LIKE = "a tar of such folders"

    @staticmethod
    def matches(path: Path) -> bool:
        return path.is_file() and path.name.endswith(TAR_SUFFIXES)

    def __init__(self, path: Path):
        """Raises DataError where it is damaged, holds more than one data set, has no class in train, or another split
        has a class that train has not."""
        self.path, self.root, self.archives = path, path.parent, (path,)
        wnids: dict[str, set[str]] = {}
        unsorted: dict[str, str] = {}  # by split: a folder with images that are in no class folder
        tops, val_folders, first = set(), set(), ""
        for member, place in self._members():
            first = first or member.name
            if member.refused or place is None:
                continue
            top, folder, wnid = place
            split = SPLIT_OF_FOLDER[folder]
            if not wnid:
                unsorted[split] = member.name.rpartition("/")[0]
                continue
            found = wnids.setdefault(split, set())
            if wnid not in found:
                found.add(checked_class_name(wnid, path))
            tops.add(top)
            if split == "val":
                val_folders.add(folder)
        if len(tops) > 1:
            first, second = sorted(tops)[:2]
            raise DataError(f"{path}: holds more than one data set ({shown(first)}/ and {shown(second)}/): unpack it "
                            "and give the folder of one")
        if len(val_folders) > 1:
            raise DataError(f"{path}: holds both val/ and validation/: unpack it and remove one")
        if "train" not in wnids:
            found = f"the first file found is {shown(first)}" if first else "no image found"
            raise DataError(f"{path}: holds no train/<class>/ folders with images ({found}): give an archive of them")
        if "val" in unsorted and not val_folders:
            raise DataError(f"{path}: {shown(unsorted['val'])}/ holds no class folders: unpack it, and {_UNSORTED_VAL}")
        self.splits = _splits(path, wnids)
        self.missing = (_NO_TEST_CLASSES,) if "test" in unsorted and "test" not in wnids else ()
        self.classes = [SynsetClass(wnid, "") for wnid in sorted(wnids["train"])]

    def entries(self, split: str) -> Iterator[Entry]:
        label_of_wnid = {c.wnid: label for label, c in enumerate(self.classes)}
        for member, place in self._members():
            # What may not be read and belongs to no split is told of with the first one.
            if split != (SPLIT_OF_FOLDER[place[1]] if place else SPLITS[0]) or (place is None and not member.refused):
                continue
            if place and not place[2]:
                yield Entry(self.path.name, member.name, -1, member.offset, member.size, member.refused or NO_CLASS)
                continue
            label = label_of_wnid.get(place[2], -1) if place else -1
            if label < 0 and not member.refused:
                raise DataError(f"{self.path}: holds {shown(member.name)}, which was not there before: run again")
            yield Entry(self.path.name, member.name, label, member.offset, member.size, member.refused)

    def _members(self) -> Iterator[tuple[Member, tuple[str, str, str] | None]]:
        """Yield what the archive holds, but for hidden files and folders, with its place: (top, "train", wnid) for
        [top/]train/<wnid>/[.../]<file>, (top, "train", "") for an image in train/ itself, None for others."""
        with open_tar(self.path) as tar:
            for member in tar.members():
                folders = [part for part in member.name.split("/") if part not in ("", ".")]
                if not folders or folders.pop().startswith("."):
                    continue
                place = _place(folders, member.name)
                if place is not None or member.refused != TOO_LARGE:  # a large file elsewhere is no image
                    yield member, place


def _place(folders: list[str], file: str) -> tuple[str, str, str] | None:
    """Return (top, split's folder, wnid) of a file in `folders`. The last two of them are taken, if they fit; then the
    first that do, for what lies deeper in a class folder."""
    for i in [len(folders) - 2, *range(len(folders) - 2)]:
        if i >= 0 and folders[i] in SPLIT_OF_FOLDER and not any(name.startswith(".") for name in folders[i + 1 :]):
            return "/".join(folders[:i]), folders[i], folders[i + 1]
    if folders and folders[-1] in SPLIT_OF_FOLDER and is_image_name(file):
        return "/".join(folders[:-1]), folders[-1], ""
    return None


def _splits(path: Path, wnids: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Return the splits that have classes; DataError where those of train are not all."""
    for split, found in wnids.items():
        if unknown := set(found) - set(wnids["train"]):
            raise DataError(f"{path}: {len(unknown)} classes of {split}/ are not in train/ ({first_few(unknown)}): "
                            "complete train/ or remove them")
    return tuple(split for split in SPLITS if split in wnids)
