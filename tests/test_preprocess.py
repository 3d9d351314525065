"""Packing: nothing lost, labels right, the same bytes for any number of workers and processes, and no half-finished
folder passes for whole."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources_on_the_spot import REJECTED, WNIDS, contents, pack, picture, write_folders

from pipeline import shards, storage
from pipeline.errors import DataError, PreprocessError
from pipeline.images import ENCODING, fit
from pipeline.manifest import check_files, load_manifest
from pipeline.packing import agreement, chunks, making, plan
from pipeline.packing.agreement import Share
from pipeline.sample import write_sample
from pipeline.shards import ShardImages


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Shards of eight images and chunks of two, so that there are several of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "PATIENCE_S", 30)
        patch.setattr(chunks, "CHUNK_IMAGES", 2)
        patch.setattr(shards, "ROWS_PER_BATCH", 4)
        patch.setattr(plan, "ROWS_PER_SHARD", {"jpeg": 8, "raw": 4})
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("source") / "data")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "new" / "one"
    pack(source, folder)
    return folder


def test_bytes_do_not_depend_on_the_number_of_workers(packed, source, tmp_path):
    pack(source, tmp_path / "two", workers=2)
    assert sorted(contents(packed)) == ["manifest.json", "mean.npy", "rejected.jsonl", "train-00000.arrow",
                                        "train-00001.arrow", "val-00000.arrow"]
    assert contents(packed) == contents(tmp_path / "two")


def test_bytes_do_not_depend_on_the_number_of_processes(packed, source, tmp_path):
    others = [threading.Thread(target=pack, args=(source, tmp_path / "out"), kwargs={"share": Share(rank, 3)})
              for rank in (1, 2)]
    for other in others:
        other.start()
    pack(source, tmp_path / "out", share=Share(0, 3))
    for other in others:
        other.join()
    assert contents(packed) == contents(tmp_path / "out")


def test_every_image_is_packed_or_listed(packed, source):
    manifest, _ = load_manifest(packed)
    check_files(packed, manifest.files())
    assert manifest.layout == "class-folders" and manifest.encoding == ENCODING and manifest.store == "jpeg"
    assert [c.wnid for c in manifest.classes] == list(WNIDS)
    assert {name: (split.images, split.rejected, split.class_counts) for name, split in manifest.splits.items()} == {
        "train": (12, 3, [4, 4, 4]), "val": (6, 1, [2, 2, 2])
    }
    rejected = [json.loads(line) for line in (packed / "rejected.jsonl").read_text().splitlines()]
    assert manifest.rejected == len(rejected) == len(REJECTED)
    assert {entry["member"] for entry in rejected} == REJECTED.keys()
    for entry in rejected:
        assert list(entry) == ["split", "archive", "member", "wnid", "reason", "sha256"]
        split, wnid, reason = REJECTED[entry["member"]]
        assert (entry["split"], entry["archive"], entry["wnid"]) == (split, "", wnid) and reason in entry["reason"]
        path = source / entry["member"]
        assert entry["sha256"] == (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)


@pytest.mark.parametrize("split, images", [("train", 12), ("val", 6)])
def test_shards_hold_the_fitted_images_with_their_labels(packed, source, split, images):
    stored = ShardImages(packed, load_manifest(packed)[0], split)
    assert len({stored.name(i) for i in range(len(stored))}) == len(stored) == images
    for i in range(len(stored)):
        assert stored.name(i).split("/")[:2] == [split, WNIDS[stored.labels[i]]]
        with Image.open(io.BytesIO(stored.stored(i).tobytes())) as image:
            pixels = fit((source / stored.name(i)).read_bytes())
            assert np.abs(np.asarray(image).astype(float) - pixels).mean() < 3


def test_the_raw_store_holds_the_pixels_and_the_same_statistics(packed, source, tmp_path):
    manifest = pack(source, tmp_path / "raw", store="raw")
    jpeg = load_manifest(packed)[0]
    assert manifest.mean == jpeg.mean and manifest.rgb_covariance == jpeg.rgb_covariance
    assert len(manifest.splits["train"].files) == 4 and manifest.store == "raw"
    images, encoded = ShardImages(tmp_path / "raw", manifest, "train"), ShardImages(packed, jpeg, "train")
    assert [images.name(i) for i in range(12)] == [encoded.name(i) for i in range(12)]
    for i in range(len(images)):
        assert (images.stored(i) == fit((source / images.name(i)).read_bytes())).all()


def test_statistics_are_those_of_the_training_images(packed, source):
    manifest, _ = load_manifest(packed)
    members = [path for path in sorted((source / "train").rglob("*.JPEG"))
               if str(path.relative_to(source)) not in REJECTED]
    stack = np.stack([fit(path.read_bytes()) for path in members]).astype(np.float64)
    mean = np.load(packed / "mean.npy")
    assert mean.dtype == np.float32 and mean.shape == (256, 256, 3)
    np.testing.assert_allclose(mean, stack.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(manifest.rgb_mean, stack.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest.rgb_covariance, np.cov(stack.reshape(-1, 3).T, bias=True), rtol=1e-9)


def test_published_archives_and_progress(tmp_path):
    write_sample(tmp_path / "archives", train_per_class=2, val_per_class=1)
    steps: list[tuple[int, int, str]] = []
    manifest = pack(tmp_path / "archives", tmp_path / "shards", progress=lambda *step: steps.append(step))
    assert manifest == load_manifest(tmp_path / "shards")[0]
    assert manifest.layout == "ilsvrc2012" and manifest.rejected == 0
    assert manifest.splits["train"].class_counts == [2] * 10 and manifest.splits["val"].class_counts == [1] * 10
    assert {(20, None, "listing train"), (20, 20, "packing train"), (10, 10, "packing val")} <= set(steps)
    images = ShardImages(tmp_path / "shards", manifest, "train")
    assert all(manifest.classes[images.labels[i]].wnid in images.name(i) for i in range(20))


def test_validation_images_are_held_out_where_there_are_none(source, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(source / "train")
    manifest = pack(tmp_path / "data", tmp_path / "shards", hold_out=0.34)
    train, val = (ShardImages(tmp_path / "shards", manifest, split) for split in ("train", "val"))
    names = [{images.name(i) for i in range(len(images))} for images in (train, val)]
    found = {split: counted.images + counted.rejected for split, counted in manifest.splits.items()}
    assert found == {"train": 10, "val": 5} and manifest.held_out == 0.34
    assert not names[0] & names[1] and len(names[0] | names[1]) == 12 and manifest.rejected == 3


def test_a_single_image_cannot_be_held_out(tmp_path):
    (tmp_path / "data/train/n01").mkdir(parents=True)
    (tmp_path / "data/train/n01/x.JPEG").write_bytes(picture(1))
    with pytest.raises(DataError, match="a single training image and no val images"):
        pack(tmp_path / "data", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_the_share_to_hold_out_is_no_matter_where_there_are_val_images(packed, source):
    assert pack(source, packed, hold_out=0.5) == load_manifest(packed)[0]


def test_strict_makes_a_rejection_an_error(source, tmp_path):
    with pytest.raises(DataError, match="5_link.JPEG: not a plain file; mend it, or run without --strict"):
        pack(source, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()  # seen while listing
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(source / "train")
    (tmp_path / "data/val").symlink_to(source / "val")
    for path in ("train/n03/5_link.JPEG", "train/n01/9_empty.JPEG", "train/n02/0_half.JPEG"):
        assert path in REJECTED
    clean = write_folders(tmp_path / "clean")
    (clean / "train/n03/5_link.JPEG").unlink()
    with pytest.raises(DataError, match="train/n0.*; mend it, or run without --strict"):
        pack(clean, tmp_path / "out", strict=True)
    manifest = pack(clean, tmp_path / "out")
    assert manifest.rejected == 3
    with pytest.raises(DataError, match="mend it, or run without --strict"):
        pack(clean, tmp_path / "out", strict=True)  # though all is done


def test_a_finished_folder_is_left_alone(packed, source, tmp_path):
    before = contents(packed)
    assert pack(source, packed) == load_manifest(packed)[0]
    with pytest.raises(DataError, match="already holds shards, of another source or with other options"):
        pack(source, packed, seed=1)
    assert contents(packed) == before


@pytest.mark.parametrize("name", ["notes.txt", "train/x", "train-00000-of-00002.arrow", "val-00000.arrow.bak"])
def test_a_folder_with_other_things_is_left_alone(tmp_path, source, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    (tmp_path / "train-00000.arrow").write_text("may be mine")
    with pytest.raises(DataError, match=f"holds {name.removesuffix('x')}, which is not ours"):
        pack(source, tmp_path)
    assert contents(tmp_path) == {name: b"mine", "train-00000.arrow": b"may be mine"}


def test_shards_that_nobody_knows_are_left_alone(tmp_path, source):
    (tmp_path / "train-00000.arrow").write_text("may be mine")
    with pytest.raises(DataError, match="holds train-00000.arrow and nothing that says what it was made of"):
        pack(source, tmp_path)
    assert contents(tmp_path) == {"train-00000.arrow": b"may be mine"}


def test_out_that_is_a_file(tmp_path, source):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(DataError, match="out is not a folder"):
            pack(source, out)


def test_out_in_the_source(source):
    with pytest.raises(DataError, match="lies in the source"):
        pack(source, source / "shards")


def test_a_split_without_a_usable_image(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "n01").mkdir(parents=True)
        (tmp_path / "data" / split / "n01" / "x.JPEG").write_bytes(b"" if split == "train" else picture(1))
    with pytest.raises(DataError, match="no usable train image: 1 found; the first, train/n01/x.JPEG: empty file"):
        pack(tmp_path / "data", tmp_path / "shards")
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_classes_without_a_usable_training_image_are_listed(tmp_path, caplog):
    for split, wnid, data in (("train", "n01", picture(1)), ("train", "n02", b""), ("val", "n01", picture(2)),
                              ("val", "n02", picture(3))):
        (tmp_path / "data" / split / wnid).mkdir(parents=True)
        (tmp_path / "data" / split / wnid / "x.JPEG").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        manifest = pack(tmp_path / "data", tmp_path / "shards")
    assert manifest.splits["train"].class_counts == [1, 0]
    assert caplog.messages == ["1 of 2 classes have no usable train image: n02"]


def test_names_that_are_not_utf8(tmp_path):
    name = b"\xe9t\xe9.JPEG"
    for split in ("train", "val"):
        (tmp_path / "data" / split / "n01").mkdir(parents=True)
        Path(os.fsdecode(bytes(tmp_path / "data" / split / "n01") + b"/" + name)).write_bytes(picture(1))
    manifest = pack(tmp_path / "data", tmp_path / "shards")
    assert ShardImages(tmp_path / "shards", manifest, "train").name(0) == r"train/n01/\xe9t\xe9.JPEG"


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path, source, packed, monkeypatch):
    class Full(storage.LocalStorage):
        def create(self, name):
            if name.endswith("train-00001.arrow"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().create(name)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "LocalStorage", Full)
        with pytest.raises(PreprocessError, match="shards: cannot be .* written .No space left on device.") as caught:
            pack(source, tmp_path / "shards")
    assert "\n" not in str(caught.value) and not multiprocessing.active_children()
    first = (tmp_path / "shards/train-00000.arrow").stat()
    pack(source, tmp_path / "shards")
    assert (tmp_path / "shards/train-00000.arrow").stat().st_mtime_ns == first.st_mtime_ns  # not made twice
    assert contents(tmp_path / "shards") == contents(packed)


class Killed(chunks.ChunkFitter):
    def __call__(self, chunk):
        os.kill(os.getpid(), signal.SIGKILL)


def test_where_a_worker_was_killed_is_told(tmp_path, source, monkeypatch):
    monkeypatch.setattr(making, "ChunkFitter", Killed)
    with pytest.raises(PreprocessError) as caught:
        pack(source, tmp_path / "out")
    where = re.search("killed, .* at one of [0-9]+ images from (.*) to (.*): run again", str(caught.value))
    for name in where.groups():
        assert (source / name).is_file()


def test_torchrun_shares_the_work(tmp_path, torchrun):
    write_sample(tmp_path / "archives", train_per_class=2, val_per_class=1)
    done = torchrun(2, "-m", "launch.cli", "preprocess", tmp_path / "archives", tmp_path / "two", "--workers", "1")
    assert done.stdout == f"{tmp_path / 'two'}: 20 train, 10 val images of 10 classes\n"
    torchrun(1, "-m", "launch.cli", "preprocess", tmp_path / "archives", tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
