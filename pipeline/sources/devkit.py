"""The ILSVRC-2012 development kit: the classes, and the answers for the validation images.

It numbers the classes 1 to 1000 in an order of its own. Everything after this file uses labels: the
position of a class in the list sorted by wnid.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.manifest import SynsetClass
from pipeline.sources.archives import entries, open_tar

META = "data/meta.mat"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Devkit:
    classes: list[SynsetClass]
    validation_labels: list[int]  # of validation images 1, 2, ...
    train_images: int | None  # as the kit states it


def read_devkit(path: Path) -> Devkit:
    """Read ILSVRC2012_devkit_t12.tar.gz; DataError where it is damaged or contradicts itself."""
    files: dict[str, bytes] = {}
    with open_tar(path) as tar:
        for member, refused in entries(tar):
            for wanted in (META, GROUND_TRUTH):
                if not refused and f"/{member.name}".endswith(f"/{wanted}"):
                    files[wanted] = tar.extractfile(member).read()
    for wanted in (META, GROUND_TRUTH):
        if wanted not in files:
            raise DataError(f"{path}: holds no {wanted}: not the development kit of tasks 1 and 2; download it again")

    try:
        classes_by_id, train_images = _read_meta(files[META])
    except Exception as error:  # scipy fails in many ways on a file that is not MATLAB's
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: {META} cannot be read ({type(error).__name__}: {reason}): copy it again") from None
    classes = sorted(classes_by_id.values(), key=lambda c: c.wnid)
    label_of_wnid = {c.wnid: label for label, c in enumerate(classes)}
    label_of_id = {number: label_of_wnid[c.wnid] for number, c in classes_by_id.items()}

    labels = []
    for line, text in enumerate(files[GROUND_TRUTH].split(), 1):
        if not text.isdigit() or int(text) not in label_of_id:
            raise DataError(f"{path}: {GROUND_TRUTH}, line {line}: {text.decode(errors='replace')!r} is the id of no "
                            f"class in {META}: copy it again")
        labels.append(label_of_id[int(text)])
    return Devkit(classes, labels, train_images)


def _read_meta(data: bytes) -> tuple[dict[int, SynsetClass], int | None]:
    """Return the leaf synsets (the other ones are their ancestors) by id, and their stated training images."""
    from scipy.io import loadmat

    synsets = np.atleast_1d(loadmat(io.BytesIO(data), variable_names=["synsets"], squeeze_me=True)["synsets"])
    leaves = [row for row in synsets if _scalar(row["num_children"]) == 0]
    classes = {
        int(_scalar(row["ILSVRC2012_ID"])): SynsetClass(str(_scalar(row["WNID"])), str(_scalar(row["words"])))
        for row in leaves
    }
    if not leaves or len(classes) != len(leaves) or len({c.wnid for c in classes.values()}) != len(leaves):
        raise ValueError("no synsets, or the same one twice")
    if "num_train_images" not in synsets.dtype.names:
        return classes, None
    return classes, sum(int(_scalar(row["num_train_images"])) for row in leaves)


def _scalar(value: object) -> object:
    """Unwrap what MATLAB stores as a 1x1 array."""
    return np.asarray(value).item()
