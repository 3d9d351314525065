"""ILSVRC-2010 as published, the one with answers for its test images: archives read where they lie.

Some of the images are blank, or a banner that says that they are not available. patch_images.tar has them whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError
from pipeline.sources.archives import Member, open_tar, shown
from pipeline.sources.devkit import read_answers
from pipeline.sources.ilsvrc import Ilsvrc
from pipeline.sources.source import Entry

TRAIN = "ILSVRC2010_images_train.tar"
VAL = "ILSVRC2010_images_val.tar"
DEVKIT = "ILSVRC2010_devkit-1.0.tar.gz"
TEST = "ILSVRC2010_images_test.tar"  # these three may be missing
TEST_ANSWERS = "ILSVRC2010_test_ground_truth.txt"
PATCH = "patch_images.tar"

_SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "test": "test"}  # in PATCH


class Ilsvrc2010(Ilsvrc):
    """An image of PATCH is listed in the place of the one of the same name that it replaces."""

    year = 2010
    layout = "ilsvrc2010"
    LOOKS_LIKE = f"a folder with {TRAIN}, {VAL} and {DEVKIT}"
    train, val, devkit = TRAIN, VAL, DEVKIT

    def __init__(self, path: Path):
        """Raises DataError naming what is missing, or damaged in the kit, the test answers or PATCH."""
        super().__init__(path)
        absent = [name for name in (TEST, TEST_ANSWERS, PATCH) if not (path / name).is_file()]
        self.archives += tuple(path / name for name in (TEST, TEST_ANSWERS, PATCH) if name not in absent)
        what = {TEST: "the test images", TEST_ANSWERS: "the test images' classes: they are left out",
                PATCH: "replacements for images that are blank or a banner"}
        self.missing = tuple(f"{name}, {what[name]}" for name in absent)
        if TEST not in absent and TEST_ANSWERS not in absent:
            self.splits += ("test",)
            name = path / TEST_ANSWERS
            self._test_labels = read_answers(name.read_bytes(), self._kit.label_of_id, str(name))
        self._patches = {} if PATCH in absent else self._read_patches()

    def entries(self, split: str) -> Iterator[Entry]:
        """As Ilsvrc.entries; DataError, too, for a replacement whose image is not there."""
        if split == "test":
            listed = self._numbered_entries(split, TEST, self._test_labels, TEST_ANSWERS)
        else:
            listed = super().entries(split)
        unused = {name for where, name in self._patches if where == split}
        for entry in listed:
            name = PurePosixPath(entry.member).name
            if (patch := self._patches.get((split, name))) is not None:
                unused.discard(name)
                entry = Entry(PATCH, patch.name, entry.label, patch.offset, patch.size, patch.refused)
            yield entry
        if unused:
            raise DataError(f"{self.path / PATCH}: holds {shown(min(unused))}, which is no {split} image: "
                            "use the archives that belong together")

    def _read_patches(self) -> dict[tuple[str, str], Member]:
        """Return the replacements by split and file name."""
        patches = {}
        with open_tar(self.path / PATCH) as tar:
            for member in tar.members():
                *_, folder, name = "", *PurePosixPath(member.name).parts
                if name.endswith(".JPEG"):
                    if folder not in _SPLIT_OF_FOLDER:
                        raise DataError(f"{self.path / PATCH}: holds {shown(member.name)}, which is in none of the "
                                        f"folders {', '.join(_SPLIT_OF_FOLDER)}: use the archive as published")
                    patches[_SPLIT_OF_FOLDER[folder], name] = member
        return patches
