"""The development kits of ILSVRC-2010 and 2012: the classes, and the answers for the validation images.

They number the classes from 1 in an order of their own. Everything after this file uses labels: the position of a
class in the list sorted by wnid.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.manifest import SynsetClass
from pipeline.sources.archives import open_tar

META = "data/meta.mat"


@dataclass(frozen=True)
class Devkit:
    classes: list[SynsetClass]
    label_of_id: dict[int, int]  # by ILSVRC2012_ID (or 2010)
    validation_labels: list[int]  # of validation images 1, 2, ...


def read_devkit(path: Path, year: int) -> Devkit:
    """Read the .tar.gz of ILSVRC's `year`, 2010 or 2012; DataError where it is damaged or contradicts itself."""
    truth = f"data/ILSVRC{year}_validation_ground_truth.txt"
    files: dict[str, bytes] = {}
    with open_tar(path) as tar:
        for member in tar.members():
            for wanted in (META, truth):
                if not member.refused and f"/{member.name}".endswith(f"/{wanted}"):
                    files[wanted] = tar.read(member)
    for wanted in (META, truth):
        if wanted not in files:
            raise DataError(f"{path}: holds no {wanted}: not the development kit of ILSVRC-{year}; download it again")

    try:
        classes_by_id = _read_meta(files[META], f"ILSVRC{year}_ID")
    except Exception as error:  # scipy fails in many ways on a file that is not MATLAB's
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: {META} cannot be read ({type(error).__name__}: {reason}): copy it again") from None
    classes = sorted(classes_by_id.values(), key=lambda c: c.wnid)
    label_of_wnid = {c.wnid: label for label, c in enumerate(classes)}
    label_of_id = {number: label_of_wnid[c.wnid] for number, c in classes_by_id.items()}
    return Devkit(classes, label_of_id, read_answers(files[truth], label_of_id, f"{path}: {truth}"))


def read_answers(text: bytes, label_of_id: dict[int, int], name: str) -> list[int]:
    """Return the labels that `text`, the file `name` with one id a line, gives for images 1, 2, ..."""
    labels = []
    for line, number in enumerate(text.split(), 1):
        if not number.isdigit() or int(number[:9]) not in label_of_id:
            raise DataError(f"{name}, line {line}: {number[:20].decode(errors='replace')!r} is the id of no class in "
                            f"{META}: copy it again")
        labels.append(label_of_id[int(number)])
    return labels


def _read_meta(data: bytes, id_field: str) -> dict[int, SynsetClass]:
    """Return the leaf synsets by id; the other ones are their ancestors."""
    from scipy.io import loadmat

    synsets = np.atleast_1d(loadmat(io.BytesIO(data), variable_names=["synsets"], squeeze_me=True)["synsets"])
    leaves = [row for row in synsets if _scalar(row["num_children"]) == 0]
    classes = {
        int(_scalar(row[id_field])): SynsetClass(str(_scalar(row["WNID"])), str(_scalar(row["words"])))
        for row in leaves
    }
    if not leaves or len(classes) != len(leaves) or len({c.wnid for c in classes.values()}) != len(leaves):
        raise ValueError("no synsets, or the same one twice")
    return classes


def _scalar(value: object) -> object:
    """Unwrap what MATLAB stores as a 1x1 array."""
    return np.asarray(value).item()
