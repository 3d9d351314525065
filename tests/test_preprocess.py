"""Packing: nothing lost, the same bytes for any number of workers, and no half-finished folder passes for whole."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import preprocess as packing
from pipeline import shards
from pipeline.errors import DataError, PreprocessError
from pipeline.images import ENCODING, fit
from pipeline.manifest import check_files, load_manifest
from pipeline.preprocess import preprocess
from pipeline.sample import write_sample
from pipeline.shards import ShardImages, ShardWriter
from pipeline.sources import open_source
from pipeline.workers import WorkerLost, Workers

ROOT = Path(__file__).resolve().parent.parent
WNIDS = ("n01", "n02", "n03")
REJECTED = [  # split, name, label, what the reason holds; in the order of the source
    ("train", "train/n01/9_empty.JPEG", 0, "empty file"),
    ("train", "train/n02/0_half.JPEG", 1, "truncated"),
    ("train", "train/n03/5_link.JPEG", 2, "not a plain file"),
    ("val", "val/n02/0_text.JPEG", 1, "not an image"),
]


def picture(seed: int, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    cells.resize((320, 240), Image.Resampling.BICUBIC).convert(mode).save(file, kind)
    return file.getvalue()


def write_folders(folder: Path) -> Path:
    for split, each in (("train", 4), ("val", 2)):
        for label, wnid in enumerate(WNIDS):
            (folder / split / wnid).mkdir(parents=True)
            for i in range(each):
                (folder / split / wnid / f"{i + 1}.JPEG").write_bytes(picture(10 * label + i))
    (folder / "train/n01/3.JPEG").write_bytes(picture(91, "L"))
    (folder / "train/n02/3.JPEG").write_bytes(picture(92, "CMYK"))
    (folder / "train/n03/3.JPEG").write_bytes(picture(93, kind="PNG"))
    (folder / "train/n01/9_empty.JPEG").write_bytes(b"")
    (folder / "train/n02/0_half.JPEG").write_bytes(picture(94)[:3000])
    (folder / "train/n03/5_link.JPEG").symlink_to("nowhere")
    (folder / "val/n02/0_text.JPEG").write_bytes(b"not found")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("source") / "data")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Shards by number of workers; chunks of two images, so that their order could get mixed up."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_IMAGES", 2)
        patch.setattr(shards, "ROWS_PER_BATCH", 4)
        patch.setattr(shards, "ROWS_PER_SHARD", 8)
        for workers in (1, 2):
            folders[workers] = tmp_path_factory.mktemp("shards") / "new" / str(workers)
            preprocess(source, folders[workers], workers)
    return folders


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bytes_do_not_depend_on_the_number_of_workers(packed):
    one, two = contents(packed[1]), contents(packed[2])
    assert sorted(one) == ["manifest.json", "mean.npy", "rejected.jsonl", "train-00000.arrow", "train-00001.arrow",
                           "val-00000.arrow"]
    assert one == two


def test_every_image_is_packed_or_listed(packed, source):
    manifest, _ = load_manifest(packed[2])
    check_files(packed[2], manifest.files())
    assert manifest.layout == "class-folders" and manifest.encoding == ENCODING
    assert [c.wnid for c in manifest.classes] == list(WNIDS)
    assert {name: (split.images, split.class_counts) for name, split in manifest.splits.items()} == {
        "train": (12, [4, 4, 4]), "val": (6, [2, 2, 2])
    }
    rejected = [json.loads(line) for line in (packed[2] / "rejected.jsonl").read_text().splitlines()]
    assert manifest.rejected == len(rejected) == len(REJECTED)
    for entry, (split, name, label, reason) in zip(rejected, REJECTED):
        assert list(entry) == ["split", "name", "label", "reason", "sha256"]
        assert (entry["split"], entry["name"], entry["label"]) == (split, name, label)
        assert reason in entry["reason"]
        path = source / name
        assert entry["sha256"] == (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_hold_the_fitted_images_with_their_labels(packed, source, split):
    images = ShardImages(packed[2], load_manifest(packed[2])[0], split)
    expected = [i for i in open_source(source).read(split) if (split, i.name) not in {r[:2] for r in REJECTED}]
    assert len(images) == len(expected)
    for i, image in enumerate(expected):
        assert images.name(i) == image.name and images.labels[i] == image.label
        with Image.open(io.BytesIO(images.encoded(i).tobytes())) as stored:
            assert np.abs(np.asarray(stored).astype(float) - fit(image.data)).mean() < 3


def test_statistics_are_those_of_the_training_images(packed, source):
    manifest, _ = load_manifest(packed[2])
    names = {name for _, name, _, _ in REJECTED}
    stack = np.stack([fit(i.data) for i in open_source(source).read("train") if i.name not in names]).astype(np.float64)
    mean = np.load(packed[2] / "mean.npy")
    assert mean.dtype == np.float32 and mean.shape == (256, 256, 3)
    np.testing.assert_allclose(mean, stack.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(manifest.rgb_mean, stack.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest.rgb_covariance, np.cov(stack.reshape(-1, 3).T, bias=True), rtol=1e-9)


def test_published_archives_and_progress(tmp_path):
    write_sample(tmp_path / "archives", train_per_class=2, val_per_class=1)
    steps: list[tuple[int, int, str]] = []
    manifest = preprocess(tmp_path / "archives", tmp_path / "shards", 1, lambda *step: steps.append(step))
    assert manifest == load_manifest(tmp_path / "shards")[0]
    assert manifest.layout == "ilsvrc2012" and manifest.rejected == 0
    assert manifest.splits["train"].class_counts == [2] * 10 and manifest.splits["val"].class_counts == [1] * 10
    assert steps == [(20, 20, "train"), (10, 10, "val")]
    images = ShardImages(tmp_path / "shards", manifest, "train")
    assert all(images.name(i).startswith(manifest.classes[images.labels[i]].wnid + "/") for i in range(20))


def test_a_finished_folder_is_left_alone(packed, source):
    before = contents(packed[1])
    with pytest.raises(DataError, match="already holds shards; choose another folder"):
        preprocess(source, packed[1])
    assert contents(packed[1]) == before


@pytest.mark.parametrize("name", ["notes.txt", "train", "train-00000-of-00002.arrow", "val-00000.arrow.bak"])
def test_a_folder_with_other_things_is_left_alone(tmp_path, source, name):
    (tmp_path / name).mkdir() if name == "train" else (tmp_path / name).write_text("mine")
    (tmp_path / "train-00000.arrow").write_text("may be mine")
    with pytest.raises(DataError, match=f"holds {name}, which is not ours"):
        preprocess(source, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "train-00000.arrow"])


def test_out_that_is_a_file(tmp_path, source):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="out: not a usable folder"):
        preprocess(source, tmp_path / "out")


def test_a_bad_source_leaves_an_interrupted_run_as_it_was(tmp_path):
    (tmp_path / "train-00000.arrow").write_text("half")
    with pytest.raises(DataError, match="does not exist"):
        preprocess(tmp_path / "nothing", tmp_path)
    assert contents(tmp_path) == {"train-00000.arrow": b"half"}


def test_truncated_archive_leaves_no_manifest_and_the_next_run_starts_again(tmp_path, source, packed, monkeypatch):
    write_sample(tmp_path / "archives", train_per_class=2, val_per_class=1)
    archive = tmp_path / "archives" / "ILSVRC2012_img_train.tar"
    with tarfile.open(archive) as tar:
        last = max(tar.getmembers(), key=lambda member: member.offset)
    whole = archive.read_bytes()
    monkeypatch.setattr(packing, "CHUNK_IMAGES", 2)
    monkeypatch.setattr(shards, "ROWS_PER_BATCH", 4)
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 8)
    out = tmp_path / "shards"
    os.truncate(archive, last.offset_data + last.size)
    with pytest.raises(DataError, match="truncated or damaged"):
        preprocess(tmp_path / "archives", out, 1)
    assert not out.exists()  # seen before anything was written

    after = last.offset_data + last.size
    archive.write_bytes(whole[: last.offset_data] + b"\xff" * last.size + whole[after:])  # only the last class is bad
    with pytest.raises(DataError, match=f"{last.name} inside: truncated or damaged"):
        preprocess(tmp_path / "archives", out, 1)
    left = contents(out)
    assert "train-00000.arrow" in left and "manifest.json" not in left

    (out / "train-00099.arrow").write_text("of a larger data set")
    preprocess(source, out, 1)
    assert contents(out) == contents(packed[1])


def test_a_split_without_a_usable_image(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "n01").mkdir(parents=True)
        (tmp_path / "data" / split / "n01" / "x.JPEG").write_bytes(b"" if split == "train" else picture(1))
    with pytest.raises(DataError, match="no usable train image: 1 found; the first, train/n01/x.JPEG: empty file"):
        preprocess(tmp_path / "data", tmp_path / "shards", 1)
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_classes_without_a_usable_training_image_are_listed(tmp_path, caplog):
    for split, wnid, data in (("train", "n01", picture(1)), ("train", "n02", b""), ("val", "n01", picture(2)),
                              ("val", "n02", picture(3))):
        (tmp_path / "data" / split / wnid).mkdir(parents=True)
        (tmp_path / "data" / split / wnid / "x.JPEG").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        manifest = preprocess(tmp_path / "data", tmp_path / "shards", 1)
    assert manifest.splits["train"].class_counts == [1, 0]
    assert caplog.messages == ["1 of 2 classes have no usable train image: n02"]


def test_names_that_are_not_utf8(tmp_path):
    name = b"\xe9t\xe9.JPEG"
    for split in ("train", "val"):
        (tmp_path / "data" / split / "n01").mkdir(parents=True)
        Path(os.fsdecode(bytes(tmp_path / "data" / split / "n01") + b"/" + name)).write_bytes(picture(1))
    manifest = preprocess(tmp_path / "data", tmp_path / "shards", 1)
    assert ShardImages(tmp_path / "shards", manifest, "train").name(0) == r"train/n01/\xe9t\xe9.JPEG"


def test_a_full_disk_is_one_line(tmp_path, source, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(PreprocessError, match="shards: cannot be written .No space left on device.") as caught:
        preprocess(source, tmp_path / "shards", 1)
    assert "\n" not in str(caught.value) and not multiprocessing.active_children()


def test_a_killed_worker_is_one_line(tmp_path, source, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_IMAGES", 2)

    def kill_one(done: int, total: int | None, split: str) -> None:
        if done == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(PreprocessError, match="a worker process was killed") as caught:
        preprocess(source, tmp_path / "shards", 2, kill_one)
    assert "\n" not in str(caught.value) and not multiprocessing.active_children()
    assert not (tmp_path / "shards" / "manifest.json").exists()


def act(order: str) -> str:
    """What the processes of the next test do."""
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "die while writing":  # a result that the pipe cannot take at once
        threading.Thread(target=lambda: (time.sleep(0.05), os.kill(os.getpid(), signal.SIGKILL))).start()
        return "x" * (1 << 30)
    if order == "sleep":
        time.sleep(60)
    return order.upper()


@pytest.mark.parametrize("order", ["die", "die while writing"])
def test_a_lost_worker_fails_its_call_and_only_that(order):
    with Workers(2, act) as workers:
        lost, other = workers.submit(order), workers.submit("echo")
        assert other.result(timeout=30) == "ECHO"
        with pytest.raises(WorkerLost, match="was killed"):
            lost.result(timeout=30)
    assert not multiprocessing.active_children()


def test_leaving_does_not_wait_for_busy_workers():
    with Workers(2, act) as workers:
        results = [workers.submit(order) for order in ("echo", "sleep", "sleep", "sleep")]
        assert results[0].result(timeout=30) == "ECHO"
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert not multiprocessing.active_children()


CHILD = """
import multiprocessing, signal, sys
from pathlib import Path
from pipeline import preprocess as packing

def report(done, total, split):
    if done == 2:
        print(*(p.pid for p in multiprocessing.active_children()), flush=True)
        signal.pause()  # until the test's signal comes

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    packing.CHUNK_IMAGES = 2
    try:
        packing.preprocess(Path(sys.argv[1]), Path(sys.argv[2]), 2, report)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_an_interrupted_or_killed_run(tmp_path, source, number):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    child = subprocess.Popen(
        [sys.executable, script, source, tmp_path / "shards"], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        workers = [int(pid) for pid in child.stdout.readline().split()]
        assert len(workers) == 2
        if number == signal.SIGINT:  # Ctrl-C reaches every process of the terminal
            for pid in workers:
                os.kill(pid, number)
            time.sleep(0.3)
            os.killpg(child.pid, number)
        else:
            child.kill()
        said, errors = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    if number == signal.SIGINT:
        assert said == "interrupted\n" and errors == ""
    deadline = time.monotonic() + 10
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, workers))
    assert not (tmp_path / "shards" / "manifest.json").exists()
