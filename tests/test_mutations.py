"""A thousand damaged inputs: no crash, no hang, no wrong label, and what was read and what was rejected add up."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sources_on_the_spot import pack

from pipeline import verify as verifying
from pipeline.errors import DataError
from pipeline.manifest import load_manifest
from pipeline.packing import making
from pipeline.sample import write_sample
from pipeline.shards import ShardImages

EXAMPLES = 200  # for each of five kinds
WNIDS = [f"n0000000{i}" for i in range(3)]
thorough = settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))

# A change is (kind, place as a share of the file, how much).
changes = st.lists(
    st.tuples(st.sampled_from(["flip", "flip", "cut", "zero", "double"]), st.floats(0, 1, exclude_max=True),
              st.integers(0, 255)),
    min_size=1, max_size=4,
)


def damaged(data: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    damaged = bytearray(data)
    for kind, where, amount in changes:
        place = int(where * len(damaged))
        if kind == "flip" and damaged:
            damaged[place] ^= 1 << amount % 8
        elif kind == "cut":
            del damaged[place:]
        elif kind == "zero":
            damaged[place : place + amount] = bytes(len(damaged[place : place + amount]))
        elif kind == "double":
            damaged[place:place] = damaged[place : place + amount]
    return bytes(damaged)


class HereAndNow:
    """In place of worker processes, which take longer to start than these inputs to pack."""

    def __init__(self, number, function):
        self._function = function

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, argument) -> Future:
        future: Future = Future()
        try:
            future.set_result(self._function(argument))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    monkeypatch.setattr(making, "Workers", HereAndNow)
    monkeypatch.setattr(verifying, "Workers", HereAndNow)


def picture(label: int, i: int) -> bytes:
    cells = np.random.default_rng([label, i]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(cells).resize((40, 32)).save(file, ("JPEG", "PNG", "WEBP", "GIF", "BMP")[i % 5])
    return file.getvalue()


def images() -> list[tuple[str, int, bytes]]:
    return [(f"{wnid}_{i}", label, picture(label, i)) for i in range(5) for label, wnid in enumerate(WNIDS)]


def as_tar(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def check(source: Path, out: Path, found: int | None = None) -> bool:
    """Pack; the error is one line, or everything adds up and every label is that of the image's name."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        pack(source, out, hold_out=0.2)
    except DataError as error:
        assert "\n" not in str(error)
        assert not (out / "manifest.json").exists()
        return False
    manifest, _ = load_manifest(out)
    verifying.verify(out, manifest, 1)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == manifest.rejected
    if found is not None:
        assert found == sum(split.images + split.rejected for split in manifest.splits.values())
    for split in manifest.splits:
        stored = ShardImages(out, manifest, split)
        for i in range(len(stored)):
            assert manifest.classes[stored.labels[i]].wnid in stored.name(i)
    return True


@thorough
@given(st.integers(0, 14), changes)
def test_images(tmp_path_factory, which, changes):
    """One image of a tar of class folders is damaged: the others are packed."""
    folder = tmp_path_factory.getbasetemp() / "images"
    folder.mkdir(exist_ok=True)
    members = [(f"{split}/{name.split('_')[0]}/{name}.JPEG", damaged(data, changes) if i == which else data)
               for split in ("train", "val") for i, (name, _, data) in enumerate(images())]
    (folder / "data.tar").write_bytes(as_tar(members))
    assert check(folder / "data.tar", folder / "out", found=30)


@thorough
@given(changes)
def test_tars(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "tars"
    folder.mkdir(exist_ok=True)
    members = [(f"{split}/{name.split('_')[0]}/{name}.JPEG", data)
               for split in ("train", "val") for name, _, data in images()]
    (folder / "data.tar").write_bytes(damaged(as_tar(members), changes))
    check(folder / "data.tar", folder / "out")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("published")
    write_sample(folder, train_per_class=1, val_per_class=1)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@thorough
@given(st.integers(0, 2), changes)
def test_published_archives(published, tmp_path_factory, which, changes):
    folder = tmp_path_factory.getbasetemp() / "published"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for i, (name, data) in enumerate(sorted(published.items())):
        (folder / "data" / name).write_bytes(damaged(data, changes) if i == which else data)
    shutil.rmtree(folder / "out", ignore_errors=True)
    try:
        manifest = pack(folder / "data", folder / "out")
    except DataError as error:
        assert "\n" not in str(error) and not (folder / "out/manifest.json").exists()
        return
    stored = ShardImages(folder / "out", manifest, "train")
    assert all(manifest.classes[stored.labels[i]].wnid in stored.name(i) for i in range(len(stored)))
    for split in manifest.splits.values():
        assert split.images + split.rejected >= 10


@thorough
@given(changes)
def test_parquet(tmp_path_factory, changes):
    """Labels of 0 to 2 stand beside paths that carry the wnid: where they disagree, packing stops."""
    folder = tmp_path_factory.getbasetemp() / "parquet"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    names, labels, data = zip(*images())
    table = pa.table({
        "image": pa.array([{"bytes": one, "path": f"{name}.JPEG"} for one, name in zip(data, names)]),
        "label": pa.array(labels, pa.int64()),
    })
    file = io.BytesIO()
    pa.parquet.write_table(table, file, row_group_size=4)
    for split in ("train", "validation"):
        (folder / "data" / f"{split}-00000-of-00001.parquet").write_bytes(
            damaged(file.getvalue(), changes) if split == "train" else file.getvalue())
    check(folder / "data", folder / "out")


@pytest.fixture(scope="module")
def shards(published, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "data").mkdir()
    for name, data in published.items():
        (folder / "data" / name).write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "Workers", HereAndNow)
        pack(folder / "data", folder / "out")
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@thorough
@given(st.sampled_from(["manifest.json", "manifest.json", "train-00000.arrow", "mean.npy"]), changes)
def test_shards_and_manifests(shards, tmp_path_factory, name, changes):
    folder = tmp_path_factory.getbasetemp() / "damaged-shards"
    folder.mkdir(exist_ok=True)
    for file, data in shards.items():
        (folder / file).write_bytes(data)
    changed = damaged(shards[name], changes)
    (folder / name).write_bytes(changed)
    try:
        manifest, _ = load_manifest(folder)
        stored = ShardImages(folder, manifest, "train")
        assert [dataclasses.astuple(c)[0] for c in manifest.classes] == sorted({c.wnid for c in manifest.classes})
        verifying.verify(folder, manifest, 1)
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert name == "manifest.json" or changed == shards[name]  # a file that passes is the one that was written
    assert len(stored) == sum(manifest.splits["train"].class_counts)
