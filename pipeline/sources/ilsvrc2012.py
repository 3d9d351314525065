"""ILSVRC-2012 as published: three archives, read where they lie.

ILSVRC2012_img_train.tar (one <wnid>.tar a class), ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError
from pipeline.sources.archives import entries, open_tar
from pipeline.sources.devkit import read_devkit
from pipeline.sources.source import SourceImage

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


class Ilsvrc2012:
    """The three archives in one folder.

    Training images come class by class (sorted by wnid), validation images in the order of their archive;
    inside a class, too, the archive's order holds. Opening reads the development kit and the headers of the
    outer archives (seconds), so that what is missing shows before work begins.
    """

    layout = "ilsvrc2012"

    @staticmethod
    def matches(path: Path) -> bool:
        found = [(path / name).is_file() for name in (TRAIN, VAL, DEVKIT)]
        return all(found) or (any(found) and not (path / "train").is_dir())

    def __init__(self, path: Path):
        """Raises DataError naming what is missing, damaged or in contradiction."""
        missing = [name for name in (TRAIN, VAL, DEVKIT) if not (path / name).is_file()]
        if missing:
            raise DataError(f"{path}: {' and '.join(missing)} missing: put it beside the others")
        self.path = path
        self._train, self._val = path / TRAIN, path / VAL
        self._devkit = read_devkit(path / DEVKIT)
        self.classes = self._devkit.classes
        self._class_tars, self._refused = self._find_class_tars()
        self._check_validation_images()

    def count(self, split: str) -> int | None:
        return self._devkit.train_images if split == "train" else len(self._devkit.validation_labels)

    def read(self, split: str) -> Iterator[SourceImage]:
        return self._read_train() if split == "train" else self._read_val()

    def _find_class_tars(self) -> tuple[list[tarfile.TarInfo], list[SourceImage]]:
        """Return the member of each class, by label, and the members that are refused."""
        label_of_wnid = {c.wnid: label for label, c in enumerate(self.classes)}
        found: dict[int, tarfile.TarInfo] = {}
        refused_entries = []
        with open_tar(self._train) as tar:
            for member, refused in entries(tar):
                if refused:
                    refused_entries.append(SourceImage(member.name, -1, b"", refused))
                    continue
                name = PurePosixPath(member.name)
                label = label_of_wnid.get(name.stem) if name.suffix == ".tar" else None
                if label is None:
                    raise DataError(f"{self._train}: holds {member.name}, which is no class of {DEVKIT}: "
                                    "use the two that belong together")
                if label in found:
                    raise DataError(f"{self._train}: holds {name.name} twice: copy it again")
                found[label] = member
        missing = [c.wnid for label, c in enumerate(self.classes) if label not in found]
        if missing:
            listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise DataError(f"{self._train}: {len(missing)} of {len(self.classes)} classes missing ({listed}): "
                            "copy it again")
        return [found[label] for label in range(len(self.classes))], refused_entries

    def _check_validation_images(self) -> None:
        expected = len(self._devkit.validation_labels)
        numbers = set()
        images = 0
        with open_tar(self._val) as tar:
            for member, refused in entries(tar):
                if not refused:
                    images += 1
                    numbers.add(self._number(member))
        if images != expected or len(numbers) != expected or not numbers <= set(range(1, expected + 1)):
            raise DataError(f"{self._val}: holds {images} images, {len(numbers)} of them different; {DEVKIT} has "
                            f"answers for 1 to {expected}: copy the one that is not whole again")

    def _number(self, member: tarfile.TarInfo) -> int:
        match = VAL_NAME.fullmatch(PurePosixPath(member.name).name)
        if match is None:
            raise DataError(f"{self._val}: holds {member.name}, which is not named ILSVRC2012_val_<8 digits>.JPEG: "
                            "use the archive as published")
        return int(match[1])

    def _read_train(self) -> Iterator[SourceImage]:
        yield from self._refused
        with open_tar(self._train) as outer:
            for label, class_tar in enumerate(self._class_tars):
                wnid = self.classes[label].wnid
                with open_tar(f"{self._train}: {wnid}.tar inside", outer.extractfile(class_tar)) as tar:
                    for member, refused in entries(tar):
                        data = b"" if refused else tar.extractfile(member).read()
                        yield SourceImage(f"{wnid}/{member.name}", label, data, refused)

    def _read_val(self) -> Iterator[SourceImage]:
        with open_tar(self._val) as tar:
            for member, refused in entries(tar):
                if refused:
                    yield SourceImage(member.name, -1, b"", refused)
                else:
                    label = self._devkit.validation_labels[self._number(member) - 1]
                    yield SourceImage(member.name, label, tar.extractfile(member).read())
