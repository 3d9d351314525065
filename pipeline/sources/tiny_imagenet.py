"""Tiny-ImageNet (tiny-imagenet-200), unzipped: 200 classes of 64 x 64 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.sources.archives import shown
from pipeline.sources.labelled_folders import TEST_WITHOUT_CLASSES, LabelledFolders, wnid_folder
from pipeline.sources.words import WORDS, lines, read_words, text

WNIDS = "wnids.txt"  # a wnid a line
VAL_ANNOTATIONS = "val/val_annotations.txt"

_COLUMNS = 6  # file name, wnid, x, y, w, h


class TinyImageNet(LabelledFolders):
    """Opening reads the label files. words.txt is that of the whole of WordNet; only the words of the classes are kept.
    """

    layout = "tiny-imagenet"
    LOOKS_LIKE = f"a folder with {WNIDS}, {WORDS}, train/ and {VAL_ANNOTATIONS}"
    images_of_class = "/images"
    images_of_val = "val/images"

    @staticmethod
    def matches(path: Path) -> bool:
        """A copy whose images have been sorted into plain class folders does not match, be there a wnids.txt or not."""
        if not (path / WNIDS).is_file():
            return False
        if (path / VAL_ANNOTATIONS).is_file() or (path / "val/images").is_dir():
            return True
        folder = wnid_folder(path / "train")
        return folder is not None and (folder / "images").is_dir()

    def __init__(self, path: Path):
        """Raises DataError naming what is missing, the line of a label file that is damaged, and where the label files
        and the folders of train/ disagree."""
        self.path = self.root = path
        missing = [name for name in (WORDS, VAL_ANNOTATIONS) if not (path / name).is_file()]
        missing += [f"{name}/" for name in ("train", "val/images") if not (path / name).is_dir()]
        if missing:
            raise DataError(f"{path}: {' and '.join(missing)} missing: unzip all of the download")
        names, words_file, annotations = path / WNIDS, path / WORDS, path / VAL_ANNOTATIONS
        self.archives = (names, words_file, annotations)
        wnids = _read_wnids(names)
        words = read_words(words_file, wnids)
        for wnid in wnids:
            if wnid not in words:
                raise DataError(f"{words_file}: has no words for {shown(wnid)} of {WNIDS}: restore the file")
        self._set_classes(words, names)
        self._set_val_labels(_read_annotations(annotations), annotations, names)
        self.missing = (TEST_WITHOUT_CLASSES,) if (path / "test").is_dir() else ()


def _read_wnids(path: Path) -> set[str]:
    wnids = set()
    for number, line in lines(path):
        wnid = text(line, path, number)
        if wnid in wnids:
            raise DataError(f"{path}: line {number} names {shown(wnid)} again: restore the file")
        wnids.add(wnid)
    return wnids


def _read_annotations(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, image's file name, wnid)."""
    for number, line in lines(path):
        columns = text(line, path, number).split("\t")
        if len(columns) != _COLUMNS:
            raise DataError(f"{path}: line {number} has not the {_COLUMNS} columns file, wnid, x, y, w, h with tabs "
                            "between them: restore the file")
        yield number, columns[0], columns[1]
