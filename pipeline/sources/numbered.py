"""What Parquet files and WebDataset tars have in common: images that carry the number of their class, not its name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.manifest import SPLITS, SynsetClass
from pipeline.sources.archives import shown
from pipeline.sources.source import Entry

LARGEST_NUMBER = 999_999  # a damaged one must not cost memory
UNLABELLED = -1  # what publishers write for test images whose class they keep to themselves

_SPLIT_OF_WORD = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val",
                  "test": "test"}
_WNID = re.compile(r"n[0-9]{8}")
_WNID_AT_END = re.compile(r"(?:^|[^0-9A-Za-z])(n[0-9]{8})(?:\.\w*)?$")  # ILSVRC2012_val_00000293_n01440764.JPEG
_WNID_AT_BEGINNING = re.compile(r"(n[0-9]{8})(?![0-9A-Za-z])")  # n01440764_10026.JPEG


class NumberedSource:
    """A layout of this kind says in `_listed` which images a split holds; the rest is here.

    The wnid of a class is taken from its images' names (or from the classes' names, where these are wnids); names
    without one say nothing. Where they are not known for every class, the classes are called "0000", "0001", ...: the
    order stays that of the numbers. A number that never occurs is a class, too.
    """

    layout: str
    path: Path
    root: Path
    classes: list[SynsetClass]
    splits: tuple[str, ...]
    archives: tuple[Path, ...]
    missing: tuple[str, ...]

    def _listed(self, split: str) -> Iterator[Entry]:
        """List a split's images with the number of their class for a label, UNLABELLED where there is none."""
        raise NotImplementedError

    def entries(self, split: str) -> Iterator[Entry]:
        for entry in self._listed(split):
            if entry.label >= len(self._label_of_number) or (entry.label < 0 and not entry.refused):
                raise DataError(f"{self._place(entry)}: its label is not what it was when the source was opened: "
                                "run again")
            yield entry._replace(label=self._label_of_number[entry.label]) if entry.label >= 0 else entry

    def _number_classes(
        self, names: list[str] | None, names_file: str, words_of_wnid: dict[str, str] | None = None
    ) -> None:
        """Read all labels, and set `splits`, `missing`, `classes` and what `entries` needs.

        `names` are those of classes 0, 1, ..., as `names_file` gives them. `words_of_wnid` is another list of classes;
        it may be a longer one. Raises DataError naming the first image that contradicts another one or the names.
        """
        self._names, self._names_file = names, names_file
        self._last = len(names) - 1 if names else -1
        self._wnid_of_number: dict[int, str] = {}
        self._number_of_wnid: dict[str, int] = {}
        names_are_wnids = bool(names) and all(_WNID.fullmatch(name) for name in names)
        if names_are_wnids:
            self._wnid_of_number = dict(enumerate(names))
            self._number_of_wnid = {wnid: number for number, wnid in enumerate(names)}
            if len(self._number_of_wnid) != len(names):
                raise DataError(f"{names_file}: names two classes alike: use it as published")
        self.splits, self.missing = (), ()
        for split in SPLITS:
            self._look_through(split)
            if "train" not in self.splits:
                raise DataError(f"{self.path}: holds no training image: add the files of train")

        count = self._last + 1
        wnids = [self._wnid_of_number.get(number, "") for number in range(count)]
        words = [""] * count if names is None or names_are_wnids else names
        if words_of_wnid:
            if not all(wnids) and len(words_of_wnid) == count and all(
                    wnid in ("", listed) for wnid, listed in zip(wnids, words_of_wnid)):
                wnids = list(words_of_wnid)
            words = [words_of_wnid.get(wnid, "") for wnid in wnids]
        if not all(wnids):
            digits = max(4, len(str(self._last)))
            wnids = [f"{number:0{digits}d}" for number in range(count)]
        order = sorted(range(count), key=wnids.__getitem__)
        self.classes = [SynsetClass(wnids[number], words[number]) for number in order]
        self._label_of_number = [0] * count
        for label, number in enumerate(order):
            self._label_of_number[number] = label

    def _look_through(self, split: str) -> None:
        images, unlabelled = 0, None
        for entry in self._listed(split):
            if entry.label != UNLABELLED:
                images += 1
                self._compare(entry, split)
            elif not entry.refused:
                unlabelled = unlabelled or entry
        if unlabelled is None:
            self.splits += (split,) if images else ()
        elif images or split != "test":
            raise DataError(f"{self._place(unlabelled)}: has no label: use the data set as published")
        else:
            self.missing += ("the test images' classes: they are left out",)

    def _compare(self, entry: Entry, split: str) -> None:
        number = entry.label
        if split == "train" and self._names is None and 0 <= number <= LARGEST_NUMBER:
            self._last = max(self._last, number)
        if not 0 <= number <= self._last:
            known = (f"{self._last}, those that {self._names_file} names" if self._names else
                     LARGEST_NUMBER if split == "train" else f"{self._last}, those of the training images")
            raise DataError(f"{self._place(entry)}: its label is {number}, which is none of 0 to {known}: use the data "
                            "set as published")
        if wnid := wnid_in(entry.member):
            known, other = self._wnid_of_number.setdefault(number, wnid), self._number_of_wnid.setdefault(wnid, number)
            if known != wnid or other != number:
                before = f"label {number} was {known}" if known != wnid else f"{wnid} had label {other}"
                raise DataError(f"{self._place(entry)}: is of {wnid} by its name and has label {number}, but before, "
                                f"{before}: use the data set as published")

    def _place(self, entry: Entry) -> str:
        row = f", row {entry.offset}" if entry.block >= 0 else ""
        return f"{self.root / entry.archive}{row}, {shown(entry.member)}"


def wnid_in(name: str) -> str:
    """Return the wnid at the end or the beginning of a file's name, or ""."""
    name = name.rpartition("/")[2]
    match = _WNID_AT_END.search(name) or _WNID_AT_BEGINNING.match(name)
    return match[1] if match else ""


def files_by_split(folders: Iterable[Path], suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """Find files in the first of `folders` that has any, or in its train/, val/, validation/, test/; sorted by path.

    Their split is that of the folder, or the first word of their name that names one, or train.
    """
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for folder in folders:
        for below in ("", *_SPLIT_OF_WORD):
            if not (folder / below).is_dir():
                continue
            with os.scandir(folder / below) as files:
                for name in sorted(file.name for file in files if file.name.endswith(suffixes) and file.is_file()):
                    if not name.startswith("."):
                        words = [below] if below else re.split("[^a-z]+", name.lower())
                        split = next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), "train")
                        found[split].append(folder / below / name)
        if any(found.values()):
            break
    return found
