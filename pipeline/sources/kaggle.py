"""Kaggle's "ImageNet Object Localization Challenge", unzipped: ILSVRC-2012's images with their own label files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.sources.archives import shown
from pipeline.sources.labelled_folders import TEST_WITHOUT_CLASSES, LabelledFolders, wnid_folder
from pipeline.sources.words import LOC_SYNSET_MAPPING, lines, read_words, text

CLS_LOC = "ILSVRC/Data/CLS-LOC"
SOLUTION = "LOC_val_solution.csv"

_HEADER = b"ImageId,PredictionString"
_FIELDS_PER_BOX = 5  # wnid, x1, y1, x2, y2


class KaggleClsLoc(LabelledFolders):
    """Given is the folder that holds ILSVRC/, or ILSVRC/ itself, or CLS-LOC/. The label files lie in any of the folders
    from that which holds ILSVRC/ to CLS-LOC/.

    Opening reads the label files.
    """

    layout = "kaggle"
    LOOKS_LIKE = f"a folder with {CLS_LOC}/, {SOLUTION} and {LOC_SYNSET_MAPPING}"

    @staticmethod
    def matches(path: Path) -> bool:
        """A CLS-LOC/ whose val/ has been sorted into class folders does not match."""
        return _cls_loc(path) is not None

    def __init__(self, path: Path):
        """Raises DataError naming what is missing, the line of a label file that is damaged, and where the label files
        and the folders of train/ disagree."""
        self.path, self.root = path, _cls_loc(path) or path
        above = Path(os.path.abspath(self.root))
        places = [self.root, *above.parents[:3]]
        found = {name: next((place / name for place in places if (place / name).is_file()), None)
                 for name in (SOLUTION, LOC_SYNSET_MAPPING)}
        images = [f"{folder}/" for folder in ("train", "val") if not (self.root / folder).is_dir()]
        if len(images) == 2 and self.root == path:
            images = [f"{CLS_LOC}/"]
        missing = images + [name for name, file in found.items() if file is None]
        if missing:
            raise DataError(f"{path}: {' and '.join(missing)} missing: unzip all of the download")
        if wnid_folder(self.root / "val"):
            raise DataError(f"{self.root / 'val'}: has been sorted into class folders: give {self.root} instead of "
                            f"{path}, or restore it")
        solution, mapping = found[SOLUTION], found[LOC_SYNSET_MAPPING]
        self.archives = (solution, mapping)
        self._set_classes(read_words(mapping), mapping)
        self._set_val_labels(_read_solution(solution), solution, mapping)
        self.missing = (TEST_WITHOUT_CLASSES,) if (self.root / "test").is_dir() else ()


def _cls_loc(path: Path) -> Path | None:
    for below in (CLS_LOC, "Data/CLS-LOC"):
        if (path / below).is_dir():
            return path / below
    named = path.is_dir() and (os.path.basename(os.path.abspath(path)) == "CLS-LOC" or (path / SOLUTION).is_file())
    return path if named and wnid_folder(path / "val") is None else None


def _read_solution(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, image's file name, wnid)."""
    numbered_lines = lines(path)
    if next(numbered_lines, (1, b""))[1] != _HEADER:
        raise DataError(f"{path}: does not begin with {_HEADER.decode()}: restore the file")
    for number, line in numbered_lines:
        name, _, prediction = text(line, path, number).partition(",")
        fields = prediction.split()
        if not name or not fields or len(fields) % _FIELDS_PER_BOX:
            raise DataError(f"{path}: line {number} is not an image and boxes \"wnid x1 y1 x2 y2\": restore the file")
        wnids = fields[::_FIELDS_PER_BOX]
        if len(set(wnids)) > 1:
            raise DataError(f"{path}: line {number} gives {shown(name)} more than one class: restore the file")
        yield number, f"{name}.JPEG", wnids[0]
