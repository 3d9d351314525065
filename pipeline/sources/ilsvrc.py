"""What ILSVRC-2012 and 2010 have in common: a tar of <wnid>.tar, archives of numbered images, a development kit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError
from pipeline.sources.archives import open_tar, shown
from pipeline.sources.devkit import read_devkit
from pipeline.sources.source import Entry
from pipeline.sources.synset_tars import class_tar_entries


class Ilsvrc:
    """The published archives in one folder. Images come in the order of their archives.

    Opening reads the development kit. While a split is listed, it is compared with the kit.
    """

    year: int
    layout: str
    train: str  # file names
    val: str
    devkit: str
    splits: tuple[str, ...] = ("train", "val")
    missing: tuple[str, ...] = ()

    @classmethod
    def matches(cls, path: Path) -> bool:
        """A folder of class folders, with what is left of the archives that it was unpacked from, does not match."""
        images = [(path / name).is_file() for name in (cls.train, cls.val)]
        return any(images) and ((all(images) and (path / cls.devkit).is_file()) or not (path / "train").is_dir())

    def __init__(self, path: Path):
        """Raises DataError naming what is missing, or damaged in the kit."""
        names = (self.train, self.val, self.devkit)
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            them = "them" if len(missing) > 1 else "it"
            raise DataError(f"{path}: {' and '.join(missing)} missing: put {them} beside the others")
        self.path = self.root = path
        self.archives = tuple(path / name for name in names)
        self._kit = read_devkit(path / self.devkit, self.year)
        self.classes = self._kit.classes

    def entries(self, split: str) -> Iterator[Entry]:
        """Raises DataError where a class is missing or too much, or there is not one image for every answer."""
        if split == "train":
            return self._train_entries()
        return self._numbered_entries(split, self.val, self._kit.validation_labels, self.devkit)

    def _train_entries(self) -> Iterator[Entry]:
        path = self.path / self.train
        label_of_wnid = {c.wnid: label for label, c in enumerate(self.classes)}
        found = set()
        with open_tar(path) as tar:
            for member in tar.members(math.inf):
                if member.refused:
                    yield Entry(self.train, member.name, -1, refused=member.refused)
                    continue
                name = PurePosixPath(member.name)
                label = label_of_wnid.get(name.stem) if name.suffix == ".tar" else None
                if label is None:
                    raise DataError(f"{path}: holds {shown(member.name)}, which is no class of {self.devkit}: "
                                    "use the two that belong together")
                if label in found:
                    raise DataError(f"{path}: holds {name.name} twice: copy it again")
                found.add(label)
                yield from class_tar_entries(tar.inside(member), path, name.stem, label, f"{name.stem}/")
        missing = [c.wnid for label, c in enumerate(self.classes) if label not in found]
        if missing:
            listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise DataError(f"{path}: {len(missing)} of {len(self.classes)} classes missing ({listed}): copy it again")

    def _numbered_entries(self, split: str, archive: str, labels: list[int], answers: str) -> Iterator[Entry]:
        """List images named ILSVRC<year>_<split>_<number>.JPEG; `labels` are those of numbers 1, 2, ... in the file
        `answers`."""
        path = self.path / archive
        pattern = re.compile(rf"ILSVRC{self.year}_{split}_(\d{{8}})\.JPEG")
        seen = bytearray(len(labels) + 1)  # by number
        images = 0
        with open_tar(path) as tar:
            for member in tar.members():
                if member.refused:
                    yield Entry(archive, member.name, -1, refused=member.refused)
                    continue
                match = pattern.fullmatch(PurePosixPath(member.name).name)
                if match is None:
                    raise DataError(f"{path}: holds {shown(member.name)}, which is not named "
                                    f"ILSVRC{self.year}_{split}_<8 digits>.JPEG: use the archive as published")
                number, images = int(match[1]), images + 1
                if 1 <= number <= len(labels):
                    seen[number] = True
                    yield Entry(archive, member.name, labels[number - 1], member.offset, member.size)
        if images != len(labels) or sum(seen) != len(labels):
            raise DataError(f"{path}: holds {images} images, {sum(seen)} of the numbers that {answers} has answers "
                            f"for, 1 to {len(labels)}: copy the one that is not whole again")
