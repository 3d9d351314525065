"""Small archives of every published kind, with every kind of damage."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.errors import DataError
from pipeline.sources import Source, open_source
from pipeline.sources.reading import Reader

# Ids in another order than the wnids', as in the real kits; the last is an ancestor of the others.
SYNSETS = [(1, "n03", "third", 0), (2, "n01", "first, one", 0), (3, "n02", "second", 0), (4, "n00", "above", 3)]
ANSWERS = [3, 1, 2, 2, 1]  # ids of images 1 to 5: n02, n03, n01, n01, n03


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.DEFAULT_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                tar.addfile(entry, io.BytesIO(member[1]))
    return file.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def class_tar(wnid: str, images: int = 2) -> tuple[str, bytes]:
    return f"{wnid}.tar", tar_of(*((f"{wnid}_{i}.JPEG", f"{wnid} {i}".encode()) for i in range(images)))


def numbered(prefix: str, numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    return [(f"{prefix}{number:08d}.JPEG", f"{prefix} {number}".encode()) for number in numbers]


def meta_mat(synsets: list[tuple[int, str, str, int]] = SYNSETS, year: int = 2012) -> bytes:
    fields = (f"ILSVRC{year}_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images")
    rows = np.empty((len(synsets), 1), [(field, object) for field in fields])
    for i, (number, wnid, words, children) in enumerate(synsets):
        below = np.arange(1.0, children + 1)[None]
        rows[i, 0] = (float(number), wnid, words, "gloss", float(children), below, 0.0, 0.0 if children else 2.0)
    file = io.BytesIO()
    savemat(file, {"synsets": rows}, do_compression=True)
    return file.getvalue()


def devkit(synsets=SYNSETS, answers=ANSWERS, meta: bytes | None = None, truth: bytes | None = None, year=2012) -> bytes:
    return gzip.compress(tar_of(
        special("kit", tarfile.DIRTYPE),
        ("kit/readme.txt", b"read me"),
        ("kit/data/meta.mat", meta_mat(synsets, year) if meta is None else meta),
        (f"kit/data/ILSVRC{year}_validation_ground_truth.txt",
         "".join(f"{n}\n" for n in answers).encode() if truth is None else truth),
    ))


def peak_bytes(work: Callable[[], object]) -> tuple[object, int]:
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read(source: Source, split: str) -> list[tuple[str, int, bytes]]:
    """Return (member, label, bytes) of what is not refused."""
    entries = [entry for entry in source.entries(split) if not entry.refused]
    return [(e.member, e.label, data) for e, data in zip(entries, Reader(source.root).read(entries))]


def refused(source: Source, split: str) -> list[tuple[str, int, str]]:
    return [(entry.member, entry.label, entry.refused) for entry in source.entries(split) if entry.refused]


def refusal(path: Path, split: str | None = None) -> str:
    """The message of the DataError that opening `path` raises, or, with `split`, of listing that."""
    if split is None:
        with pytest.raises(DataError) as caught:
            open_source(path)
    else:
        entries = open_source(path).entries(split)
        with pytest.raises(DataError) as caught:
            list(entries)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut(at: Callable[[int], int]) -> Callable[[bytes], bytes]:
    return lambda data: data[: at(len(data))]


def without_end_mark(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    return data[: last.offset_data + -(-last.size // 512) * 512]


def with_second_header_spoiled(data: bytes) -> bytes:
    second = 512 + -(-int(data[124:135], 8) // 512) * 512
    return data[:second] + b"\xff" * 512 + data[second + 512 :]


def change(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


DAMAGES = {
    "empty": cut(lambda size: 0), "in a header": cut(lambda size: 300), "in the middle": cut(lambda size: size // 3),
    "between members": without_end_mark, "a header overwritten": with_second_header_spoiled,
}
