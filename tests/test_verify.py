"""Verifying finds what hashes alone would find, and what they would not: a manifest that was made to fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sources_on_the_spot import contents, pack, write_folders

from pipeline.errors import DataError
from pipeline.files import sha256_of
from pipeline.images import encode
from pipeline.manifest import ShardFile, load_manifest
from pipeline.shards import ShardImages, write_shard
from pipeline.storage import LocalStorage
from pipeline.verify import verify


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def packed(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    pack(write_folders(folder / "data"), folder / "out", store=request.param)
    return folder / "out"


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    for name, data in contents(packed).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_what_was_packed_is_whole(packed):
    seen = []
    verify(packed, load_manifest(packed)[0], 2, lambda *step: seen.append(step))
    assert seen[-1] == (18, 18, "verifying")


@pytest.mark.parametrize("name", ["train-00000.arrow", "val-00000.arrow", "mean.npy"])
def test_a_changed_bit_is_found(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 16
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: its bytes have changed"):
        verify(folder, load_manifest(folder)[0], 1)


def replaced(folder: Path, split: str, change) -> None:
    """Write a split's shard anew with other rows, and a manifest that names its hash."""
    manifest, _ = load_manifest(folder)
    images = ShardImages(folder, manifest, split)
    rows = [[images.stored(i).tobytes(), int(images.labels[i]), images.name(i)] for i in range(len(images))]
    change(rows)
    file = write_shard(LocalStorage(folder), f"{split}-00000.arrow", *zip(*rows))
    part = dataclasses.replace(manifest.splits[split], files=[file])
    dataclasses.replace(manifest, splits={**manifest.splits, split: part}).save(LocalStorage(folder))


def test_an_image_that_cannot_be_decoded_is_named(folder):
    def cut(rows):
        rows[3][0] = rows[3][0][:-500]

    name = ShardImages(folder, load_manifest(folder)[0], "train").name(3)
    replaced(folder, "train", cut)
    with pytest.raises(DataError, match=f"train-00000.arrow: {name}: ") as caught:
        verify(folder, load_manifest(folder)[0], 1)
    assert "\n" not in str(caught.value)


def test_a_picture_of_another_size_is_named(folder):
    manifest, _ = load_manifest(folder)

    def shrink(rows):
        rows[2][0] = bytes(250 * 250 * 3) if manifest.store == "raw" else encode(np.zeros((250, 256, 3), np.uint8))

    name = ShardImages(folder, manifest, "train").name(2)
    replaced(folder, "train", shrink)
    said = "187500 bytes and not 196608" if manifest.store == "raw" else "256 x 250 pixels"
    with pytest.raises(DataError, match=f"train-00000.arrow: {name}: {said}"):
        verify(folder, load_manifest(folder)[0], 1)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_no_class_is_found(folder, label):
    def relabel(rows):
        rows[0][1] = label

    replaced(folder, "val", relabel)
    with pytest.raises(DataError, match="val-00000.arrow: other images or labels"):
        verify(folder, load_manifest(folder)[0], 1)


def test_other_labels_are_found(folder):
    def relabel(rows):
        rows[0][1] = (rows[0][1] + 1) % 3

    replaced(folder, "val", relabel)
    with pytest.raises(DataError, match="the labels of val are not those that its manifest counts"):
        verify(folder, load_manifest(folder)[0], 1)


def test_a_mean_that_is_none_is_found(folder):
    np.save(folder / "mean.npy", np.full((256, 256, 3), np.nan, np.float32))
    manifest, _ = load_manifest(folder)
    path = folder / "mean.npy"
    mean = ShardFile("mean.npy", 12, path.stat().st_size, sha256_of(path))
    dataclasses.replace(manifest, mean=mean).save(LocalStorage(folder))
    with pytest.raises(DataError, match="mean.npy: no mean image"):
        verify(folder, load_manifest(folder)[0], 1)
