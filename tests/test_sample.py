"""The drawn data set: its archives are ILSVRC-2012's, repeat byte for byte, and their pictures can be told apart."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from pipeline import sample
from pipeline.drawing import CLASSES, _ground_colour, draw
from pipeline.errors import DataError
from pipeline.sample import ARCHIVES, write_sample
from pipeline.sources import ilsvrc2012

TRAIN, VAL, SEED = 20, 4, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "new" / "folder"
    steps: list[int] = []
    counts = write_sample(out, TRAIN, VAL, SEED, progress=steps.append)
    assert counts == {"train": 10 * TRAIN, "val": 10 * VAL, "classes": 10}
    assert sum(steps) == 10 * (TRAIN + VAL) and len(steps) > 10
    assert sorted(path.name for path in out.iterdir()) == sorted(ARCHIVES)
    return out


def members(archive: str | Path | io.BytesIO) -> list[tuple[str, bytes]]:
    """Names and contents of the files of a tar, compressed or not, in their order."""
    source = {"fileobj": archive} if isinstance(archive, io.BytesIO) else {"name": archive}
    with tarfile.open(**source) as tar:
        return [(entry.name, tar.extractfile(entry).read()) for entry in tar if entry.isfile()]


def train_images(folder: Path) -> list[tuple[str, str, bytes]]:
    """Class tar, name and bytes of every training picture."""
    return [
        (outer, name, image)
        for outer, data in members(folder / ilsvrc2012.TRAIN)
        for name, image in members(io.BytesIO(data))
    ]


def devkit(folder: Path) -> dict[str, bytes]:
    return dict(members(folder / ilsvrc2012.DEVKIT))


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ARCHIVES]


def test_equal_seeds_give_equal_bytes_at_any_time_and_on_any_number_of_cores(tmp_path, monkeypatch):
    write_sample(tmp_path / "a", 3, 2, seed=5)
    monkeypatch.setattr(time, "asctime", lambda *_: "Thu Jan  1 00:00:00 1970")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    write_sample(tmp_path / "b", 3, 2, seed=5)
    write_sample(tmp_path / "c", 3, 2, seed=6)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not set(digests(tmp_path / "a")) & set(digests(tmp_path / "c"))


def test_training_archive_is_a_tar_of_one_tar_a_class(folder):
    assert [name for name, _ in members(folder / ilsvrc2012.TRAIN)] == [f"{c.wnid}.tar" for c in CLASSES]
    images = train_images(folder)
    assert Counter(outer for outer, _, _ in images) == {f"{c.wnid}.tar": TRAIN for c in CLASSES}
    for outer, name, _ in images:
        wnid, number = name.removesuffix(".JPEG").split("_")
        assert outer == f"{wnid}.tar" and number == str(int(number))
    assert len({name for _, name, _ in images}) == len({image for _, _, image in images}) == 10 * TRAIN


def test_validation_archive_is_flat_numbered_and_mixed(folder):
    names = [name for name, _ in members(folder / ilsvrc2012.VAL)]
    assert names == [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 10 * VAL + 1)]
    truth = devkit(folder)["ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"].decode()
    ids = [int(line) for line in truth.splitlines()]
    assert Counter(ids) == {number: VAL for number in range(1, 11)}
    assert sum(a != b for a, b in zip(ids, ids[1:])) > 25  # 9 where each class stands together


def test_no_header_tells_of_machine_or_hour(folder):
    for name in ARCHIVES:
        with tarfile.open(folder / name) as tar:
            assert {(e.mtime, e.uid, e.gid, e.uname, e.gname) for e in tar} == {(1338508800, 0, 0, "", "")}


def test_meta_mat_has_the_devkits_layout(folder):
    files = devkit(folder)
    assert set(files) == {
        f"ILSVRC2012_devkit_t12/{name}"
        for name in ("readme.txt", "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
    }
    meta = files["ILSVRC2012_devkit_t12/data/meta.mat"]
    synsets = loadmat(io.BytesIO(meta))["synsets"]
    assert synsets.shape == (13, 1)
    assert synsets.dtype.names == (
        "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images"
    )
    # The way that common readers take: rows of plain values, leaves are what has no children.
    rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    leaves = [row for row in rows if row["num_children"] == 0]
    assert [(row["ILSVRC2012_ID"], row["WNID"], row["words"], row["gloss"]) for row in leaves] == [
        (c.ilsvrc_id, c.wnid, c.words, c.gloss) for c in sorted(CLASSES, key=lambda c: c.ilsvrc_id)
    ]
    assert all(row["num_train_images"] == TRAIN and row["wordnet_height"] == 0 and row["children"].size == 0
               for row in leaves)
    shapes, textures, root = (row for row in rows if row["num_children"] > 0)
    assert [row["ILSVRC2012_ID"] for row in (shapes, textures, root)] == [11, 12, 13]
    assert sorted([*shapes["children"], *textures["children"]]) == list(range(1, 11))
    assert root["children"].tolist() == [11, 12] and root["wordnet_height"] == 2
    assert all(row["num_children"] == row["children"].size for row in rows)


def test_the_three_numberings_differ_everywhere():
    wnids = [c.wnid for c in CLASSES]
    assert wnids == sorted(set(wnids)) and all(len(wnid) == 9 and wnid > "n16" for wnid in wnids)
    assert sorted(c.ilsvrc_id for c in CLASSES) == list(range(1, 11))
    assert all(c.ilsvrc_id != label + 1 for label, c in enumerate(CLASSES))


def test_every_picture_is_of_the_class_that_the_archives_say(folder):
    """Draw each again from its seed and the label that a reader would find."""
    def drawn_again(split: int, number: int, label: int, image: bytes) -> bool:
        mode = Image.open(io.BytesIO(image)).mode
        return sample._jpeg(sample._Picture((SEED, split, number), label, mode)) == image

    label_of_wnid = {c.wnid: label for label, c in enumerate(CLASSES)}
    label_of_id = {c.ilsvrc_id: label for label, c in enumerate(CLASSES)}
    for i, (outer, _, image) in enumerate(train_images(folder)):
        if i % 5 == 0:
            assert drawn_again(sample.TRAIN, i, label_of_wnid[outer.removesuffix(".tar")], image)
    ids = devkit(folder)["ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"].split()
    for i, ((_, image), number) in enumerate(zip(members(folder / ilsvrc2012.VAL), ids)):
        assert drawn_again(sample.VAL, i, label_of_id[int(number)], image)


def test_modes_and_sizes(folder):
    train = [Image.open(io.BytesIO(image)) for _, _, image in train_images(folder)]
    val = [Image.open(io.BytesIO(image)) for _, image in members(folder / ilsvrc2012.VAL)]
    assert {image.format for image in train + val} == {"JPEG"}
    assert Counter(image.mode for image in train) == {"RGB": 189, "L": 10, "CMYK": 1}
    assert Counter(image.mode for image in val) == {"RGB": 38, "L": 2}
    grey_classes = {label for label, image in enumerate(train) if image.mode == "L"}
    assert len({i // TRAIN for i in grey_classes}) > 3
    sizes = [image.size for image in train]
    assert len(set(sizes)) > 50
    assert sum(w > h for w, h in sizes) > 40 and sum(w < h for w, h in sizes) > 40
    assert sum(min(size) < 256 for size in sizes) > 20 and sum(min(size) > 500 for size in sizes) > 2


def test_cmyk_picture_is_inverted_in_the_way_of_adobe(folder):
    (image,) = (i for _, _, i in train_images(folder) if Image.open(io.BytesIO(i)).mode == "CMYK")
    assert Image.open(io.BytesIO(image)).info["adobe"] == 100
    # Pillow undoes the inversion where the marker is there; black ink is never used, so K reads 0.
    assert np.asarray(Image.open(io.BytesIO(image)))[..., 3].max() < 16


def test_size_does_not_depend_on_the_class():
    for number in (0, 1):
        images = [sample._jpeg(sample._Picture((1, 0, number), label, "RGB")) for label in range(10)]
        assert len({Image.open(io.BytesIO(image)).size for image in images}) == 1
        assert len(set(images)) == 10


@pytest.mark.parametrize("arguments", [{"train_per_class": 0}, {"val_per_class": -1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(tmp_path, arguments):
    with pytest.raises(DataError, match=r"given, at least [01] wanted$"):
        write_sample(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ARCHIVES)
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(DataError, match=f"{name}: exists and is not overwritten; remove it or choose another folder$"):
        write_sample(tmp_path, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"precious"


def test_a_file_in_the_folders_place_is_one_clear_line(tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(DataError, match="out: cannot be written .* choose a folder"):
        write_sample(tmp_path / "out", 1, 1)


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path, 2, 1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", range(10))
def test_draw_is_a_function_of_label_generator_and_size(label):
    a, b, c = (draw(label, np.random.default_rng(seed), 90, 60) for seed in (1, 1, 2))
    assert a.shape == (60, 90, 3) and a.dtype == np.uint8
    assert np.array_equal(a, b)
    assert np.abs(a.astype(int) - c).mean() > 10
    for width, height in ((1, 1), (300, 4)):
        assert draw(label, np.random.default_rng(0), width, height).shape == (height, width, 3)


def test_ink_and_ground_differ_in_lightness():
    rng, weights = np.random.default_rng(0), [0.299, 0.587, 0.114]
    inks = rng.uniform(0, 1, (500, 3))
    assert min(abs(weights @ (_ground_colour(ink, rng) - ink)) for ink in inks) > 0.15


def features(pixels: np.ndarray) -> np.ndarray:
    """A histogram of hues, and edge strength at three scales, of uint8 [height, width, 3]."""
    thumbnail = Image.fromarray(pixels).resize((48, 48), Image.Resampling.BOX)
    hue, saturation, value = np.moveaxis(np.asarray(thumbnail.convert("HSV"), float), -1, 0)
    colours = np.histogram(hue, 16, (0, 256), weights=saturation * value)[0]
    grey = np.asarray(thumbnail.convert("L"), float)
    edges = [np.abs(grey[step:] - grey[:-step]).mean() for step in (1, 3, 8)]
    return np.concatenate([colours / colours.sum(), np.array(edges) / 80])


def test_classes_can_be_told_apart_but_not_by_one_feature_alone():
    """Nearest centroid of simple features; chance is 0.1."""
    table = np.array([
        [features(draw(label, np.random.default_rng([label, i]), 100, 80)) for i in range(40)] for label in range(10)
    ])
    train, test = table[:, :25], table[:, 25:]

    def accuracy(columns: slice) -> float:
        centroids = train[:, :, columns].mean(1)
        distances = np.linalg.norm(test[:, :, None, columns] - centroids, axis=-1)
        return float((distances.argmin(-1) == np.arange(10)[:, None]).mean())

    assert accuracy(slice(None)) > 0.5
    assert accuracy(slice(16, None)) > 0.2  # edges only, as in a grey picture
    assert accuracy(slice(0, 16)) < 0.9  # hues only
