"""Shards and manifest: what is written comes back, and what has been damaged is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import shards
from pipeline.errors import DataError
from pipeline.files import sha256_of, write_durably
from pipeline.manifest import Manifest, ShardFile, Split, SynsetClass, check_files, load_manifest
from pipeline.shards import ShardImages, write_shard
from pipeline.storage import LocalStorage

ROWS = 21  # two files of eight and one of five


def row(i: int) -> tuple[bytes, int, str]:
    return bytes([i]) * (i + 1), i % 3, f"n{i:08d}/ä{i}.JPEG"


def write(folder: Path, name: str, rows: range) -> ShardFile:
    return write_shard(LocalStorage(folder), name, *zip(*map(row, rows)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROWS_PER_BATCH", 4)
        files = [write(folder, f"train-{n:05d}.arrow", range(8 * n, min(ROWS, 8 * n + 8))) for n in range(3)]
        splits = {"train": Split(ROWS, 2, [7, 7, 7], files),
                  "val": Split(3, 0, [1, 1, 1], [write(folder, "val-00000.arrow", range(3))])}
    write_durably(folder / "mean.npy", b"mean")
    mean = ShardFile("mean.npy", ROWS, 4, sha256_of(folder / "mean.npy"))
    classes = [SynsetClass(f"n{i:08d}", f"word {i}") for i in range(3)]
    Manifest("class-folders", "jpeg", "none", 0, 0.0, "", classes, splits, mean, [1.0, 2.0, 3.0],
             np.eye(3).tolist()).save(LocalStorage(folder))
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "shards"))


def test_rows_come_back_in_order_from_several_files(written):
    manifest, digest = load_manifest(written)
    assert digest == sha256_of(written / "manifest.json")
    names = ["train-00000.arrow", "train-00001.arrow", "train-00002.arrow"]
    assert [file.name for file in manifest.splits["train"].files] == names
    assert [file.images for file in manifest.splits["train"].files] == [8, 8, 5]
    assert sorted(path.name for path in written.iterdir()) == ["manifest.json", "mean.npy", *names, "val-00000.arrow"]
    images = ShardImages(written, manifest, "train")
    assert len(images) == ROWS and images.labels.dtype == np.int32
    for i in (*range(ROWS), np.int64(7), np.int64(8)):
        data, label, name = row(int(i))
        assert images.stored(i).tobytes() == data and images.labels[i] == label and images.name(i) == name
    assert len(ShardImages(written, manifest, "val")) == 3


def test_images_are_read_only_views_of_the_files(written):
    images = ShardImages(written, load_manifest(written)[0], "train")
    view = images.stored(5)
    assert not view.flags.owndata and not view.flags.writeable and view.dtype == np.uint8
    assert np.shares_memory(view, images.stored(5))


def test_manifest_survives_saving(written, tmp_path):
    manifest, digest = load_manifest(written)
    manifest.save(LocalStorage(tmp_path))
    again, same_digest = load_manifest(tmp_path)
    assert again == manifest and same_digest == digest
    assert again.classes[2] == SynsetClass("n00000002", "word 2") and again.rgb_covariance[1] == [0, 1, 0]


def test_check_accepts_what_was_written(written):
    check_files(written, load_manifest(written)[0].files())


def test_a_shard_that_fails_half_way_leaves_what_was_there(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(pa.ArrowException):  # a label that is none, in the second batch
        write_shard(LocalStorage(folder), "val-00000.arrow", [b"x"] * 129, [0] * 128 + ["x"], ["x"] * 129)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_raw_pixels_are_views_too(tmp_path, written):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), np.uint8)
    file = write_shard(LocalStorage(tmp_path), "train-00000.arrow", [one.tobytes() for one in pixels], [0, 1, 2], "abc")
    manifest = dataclasses.replace(load_manifest(written)[0], store="raw",
                                   splits={"train": Split(3, 0, [1, 1, 1], [file])})
    images = ShardImages(tmp_path, manifest, "train")
    for i, view in enumerate(images.stored_batch(np.array([0, 1, 2]))):
        assert (view == pixels[i]).all() and not view.flags.owndata and not view.flags.writeable
    with pytest.raises(DataError, match="has no val images"):
        ShardImages(tmp_path, manifest, "val")


def test_raw_pixels_of_another_size_are_refused(written):
    manifest = dataclasses.replace(load_manifest(written)[0], store="raw")
    with pytest.raises(DataError, match="train-00000.arrow: an image is not 196608 bytes"):
        ShardImages(written, manifest, "train")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train-00001.arrow", "val-00000.arrow", "mean.npy"])
@pytest.mark.parametrize("damage, said", [(cut, "have changed"), (flip, "have changed"), (Path.unlink, "No such file")])
def test_check_names_the_file_that_is_damaged(folder, name, damage, said):
    manifest, _ = load_manifest(folder)
    damage(folder / name)
    with pytest.raises(DataError, match=f"{name}: .*{said}") as caught:
        check_files(folder, manifest.files())
    assert "\n" not in str(caught.value)


def test_check_without_hashes_still_sees_the_size(folder):
    manifest, _ = load_manifest(folder)
    flip(folder / "train-00001.arrow")
    check_files(folder, manifest.files(), hashes=False)
    cut(folder / "train-00002.arrow")
    with pytest.raises(DataError, match="train-00002.arrow"):
        check_files(folder, manifest.files(), hashes=False)


def write_other_columns(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("image", pa.binary())])):
        pass


@pytest.mark.parametrize("damage", [cut, Path.unlink, write_other_columns, lambda path: path.write_bytes(b"")])
def test_reader_names_a_shard_that_is_none(folder, damage):
    manifest, _ = load_manifest(folder)
    damage(folder / "train-00001.arrow")
    with pytest.raises(DataError, match="train-00001.arrow: not a readable shard"):
        ShardImages(folder, manifest, "train")


def test_reader_counts_the_rows(folder):
    manifest, _ = load_manifest(folder)
    shutil.copy(folder / "val-00000.arrow", folder / "train-00000.arrow")
    with pytest.raises(DataError, match="train holds 16 images, its manifest says 21"):
        ShardImages(folder, manifest, "train")


def test_no_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="manifest.json: cannot be read .*alexnet preprocess"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("change", [
    lambda fields: fields.pop("classes"),
    lambda fields: fields["splits"].pop("val"),
    lambda fields: fields["splits"].update(more=fields["splits"]["val"]),
    lambda fields: fields.update(store="png"),
    lambda fields: fields.update(unknown=1),
    lambda fields: fields.update(rgb_covariance=[1, 2, 3]),
    lambda fields: fields["mean"].update(name="../mean.npy"),
    lambda fields: fields["splits"]["train"]["files"][0].update(name="/etc/passwd"),
    lambda fields: fields["classes"].append("n00000003"),
    lambda fields: fields["classes"].reverse(),
    lambda fields: fields["splits"]["train"].update(rejected=-1),
    lambda fields: fields["splits"]["train"]["class_counts"].__setitem__(0, 0),
    lambda fields: fields["splits"]["train"]["files"][1].update(name=fields["splits"]["train"]["files"][0]["name"]),
    lambda fields: fields["splits"]["train"]["files"][0].update(name=".."),
    lambda fields: fields.update(rgb_mean=[1.0, float("nan"), 2.0]),
    lambda fields: fields.update(rgb_covariance=[[10**400, 0, 0], [0, 1, 0], [0, 0, 1]]),
    lambda fields: fields.update(held_out=float("nan")),
    lambda fields: fields.update(seed="x"),
    lambda fields: fields.update(layout=5),
])
def test_damaged_manifest_is_refused(folder, change):
    fields = dataclasses.asdict(load_manifest(folder)[0])
    change(fields)
    (folder / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match="manifest.json: damaged") as caught:
        load_manifest(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0\xff"])
def test_manifest_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="manifest.json: damaged"):
        load_manifest(tmp_path)


def test_manifest_of_another_format_is_refused(folder):
    fields = dataclasses.asdict(load_manifest(folder)[0])
    (folder / "manifest.json").write_text(json.dumps({**fields, "format": 99}))
    with pytest.raises(DataError, match="format 99, this program reads 2"):
        load_manifest(folder)
