"""What Kaggle's CLS-LOC and Tiny-ImageNet have in common: a folder for each class of train, and one folder of
validation images that a text file has the labels of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.errors import DataError
from pipeline.manifest import SynsetClass
from pipeline.sources.archives import shown
from pipeline.sources.folders import class_folders, files_in, first_few
from pipeline.sources.numbered import wnid_in
from pipeline.sources.source import Entry

TEST_WITHOUT_CLASSES = "the test images' classes: they are left out"

_WNID = re.compile(r"n\d{8}")


class LabelledFolders:
    """Images come class by class, sorted by wnid, then by file name; those of val sorted by file name."""

    path: Path
    root: Path
    layout: str
    archives: tuple[Path, ...]
    missing: tuple[str, ...]
    classes: list[SynsetClass]
    splits: tuple[str, ...] = ("train", "val")
    images_of_class = ""  # where the images lie inside a class folder: "" or "/images"
    images_of_val = "val"

    def _set_classes(self, words_of_wnid: Mapping[str, str], names_file: Path) -> None:
        """Raises DataError where the folders of train/ are not those of the classes."""
        if not words_of_wnid:
            raise DataError(f"{names_file}: names no class: restore the file")
        folders = set(class_folders(self.root / "train"))
        if absent := words_of_wnid.keys() - folders:
            raise DataError(f"{self.root / 'train'}: {len(absent)} classes of {names_file.name} missing "
                            f"({first_few(absent)}): copy it again")
        if unknown := folders - words_of_wnid.keys():
            raise DataError(f"{self.root / 'train'}: holds {len(unknown)} folders that are no class of "
                            f"{names_file.name} ({first_few(unknown)}): use the two that belong together")
        self.classes = [SynsetClass(wnid, words) for wnid, words in sorted(words_of_wnid.items())]

    def _set_val_labels(self, wnids: Iterable[tuple[int, str, str]], labels_file: Path, names_file: Path) -> None:
        """`wnids` are (line, image's file name, wnid) of the labels file.

        Raises DataError for an image that is there twice, and for a wnid that is none of the classes.
        """
        label_of_wnid = {c.wnid: label for label, c in enumerate(self.classes)}
        self._labels_file = labels_file
        self._val_labels: dict[str, int] = {}  # by file name
        for line, name, wnid in wnids:
            if wnid not in label_of_wnid:
                raise DataError(f"{labels_file}: line {line} gives {shown(name)} the class {shown(wnid)}, which is not "
                                f"in {names_file.name}: use the two that belong together")
            if name in self._val_labels:
                raise DataError(f"{labels_file}: line {line} names {shown(name)} again: restore the file")
            self._val_labels[name] = label_of_wnid[wnid]

    def entries(self, split: str) -> Iterator[Entry]:
        """Raises DataError where a class has no image, an image of another class, or where val's images and labels are
        not the same ones."""
        return self._train_entries() if split == "train" else self._val_entries()

    def _train_entries(self) -> Iterator[Entry]:
        for label, c in enumerate(self.classes):
            folder, entry = f"train/{c.wnid}{self.images_of_class}", None
            for entry in files_in(self.root, folder, label):
                if (named := wnid_in(entry.member)) and named != c.wnid:
                    raise DataError(f"{self.root / folder}: holds {shown(os.path.basename(entry.member))}, an image of "
                                    f"{named}: use the data set as published")
                yield entry
            if entry is None:
                raise DataError(f"{self.root / folder}: holds no image: copy it again")

    def _val_entries(self) -> Iterator[Entry]:
        unseen = set(self._val_labels)
        for entry in files_in(self.root, self.images_of_val, -1):
            name = os.path.basename(entry.member)
            label = self._val_labels.get(name)
            if label is None:
                raise DataError(f"{self.root / self.images_of_val}: {shown(name)} has no label in "
                                f"{self._labels_file.name}: use the two that belong together")
            unseen.discard(name)
            yield entry._replace(label=label)
        if unseen:
            raise DataError(f"{self.root / self.images_of_val}: {len(unseen)} images of {self._labels_file.name} "
                            f"missing ({first_few(unseen)}): copy it again")


def wnid_folder(folder: Path) -> Path | None:
    """Return a folder in `folder` that is named like a class, None where there is none."""
    if not folder.is_dir():
        return None
    with os.scandir(folder) as found:
        return next((Path(entry.path) for entry in found if _WNID.fullmatch(entry.name) and entry.is_dir()), None)
