"""The order of packing: every image once, mixed across classes, a function of the seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline import images
from pipeline.manifest import SynsetClass
from pipeline.packing import index as indexing
from pipeline.packing.index import Index
from pipeline.packing.plan import Packing, Plan
from pipeline.sources import Entry

CLASSES, EACH = 20, 500


class Listed:
    """A source of made-up entries, class by class; `block_rows` > 0 puts them into blocks."""

    path = root = Path("nowhere")
    layout, splits, archives, missing = "listed", ("train",), (), ()
    classes = [SynsetClass(f"n{i:02d}", "") for i in range(CLASSES)]

    def __init__(self, block_rows: int = 0, size: int = 1):
        self.block_rows, self.size = block_rows, size

    def entries(self, split):
        for i in range(CLASSES * EACH):
            block = i // self.block_rows if self.block_rows else -1
            yield Entry("a.tar", f"\udce9{i}", i // EACH, 10 * i, self.size, "a link" if i % 1000 == 7 else "", block)


def planned(source: Listed, **packing) -> Plan:
    return Plan(source, {"train": Index(source, "train")}, Packing(**{"hold_out": 0.1, **packing}))


def order(plan: Plan, split: str) -> list[int]:
    """The number of each image, as they stand in the shards."""
    numbers = []
    for shard in plan.shards():
        if shard.split == split:
            entries = plan.entries(shard)
            assert [entry.offset for entry in entries] == sorted(entry.offset for entry in entries)
            numbers += [entries[i].offset // 10 for i in np.argsort(shard.places)]
    return numbers


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(indexing, "ROWS_PER_BATCH", 333)


def test_the_index_gives_back_what_was_listed():
    source = Listed(block_rows=100)
    index, listed = Index(source, "train"), list(source.entries("train"))
    rows = np.array([0, 1, 332, 333, 5000, 9999])
    assert index.take(rows) == [listed[i] for i in rows]
    assert list(index.refused()) == [entry for entry in listed if entry.refused]
    assert index.entries == 10000 and (index.blocks() == np.arange(10000) // 100).all()
    assert index.sha256 == Index(source, "train").sha256 != Index(Listed(block_rows=100, size=2), "train").sha256


@pytest.mark.parametrize("block_rows", [0, 100])
def test_every_image_has_one_place(block_rows):
    plan = planned(Listed(block_rows))
    train, val = order(plan, "train"), order(plan, "val")
    assert len(train) == plan.images("train") == 9000 and len(val) == plan.images("val") == 1000
    assert sorted(train + val) == list(range(10000))


def test_held_out_images_are_of_all_classes():
    labels = np.array(order(planned(Listed()), "val")) // EACH
    counts = np.bincount(labels, minlength=CLASSES)  # 50 each; the standard deviation is 6.5
    assert counts.min() > 50 - 5 * 6.5 and counts.max() < 50 + 5 * 6.5


def test_neighbours_in_a_block_are_parted():
    """What lies side by side in a Parquet file is of one class as often as not."""
    numbers = np.array(order(planned(Listed(block_rows=100), hold_out=0.001), "train")[:8192])
    assert np.mean(np.abs(np.diff(numbers)) == 1) < 0.005
    assert np.mean(np.diff(numbers // 100) == 0) < 0.05  # a window holds 41 blocks


@pytest.mark.parametrize("block_rows, shift", [(0, 0.1), (25, 0.2)])
def test_a_sequential_read_is_mixed(block_rows, shift):
    """In any stretch of the order every class has about its share."""
    labels = np.array(order(planned(Listed(block_rows), hold_out=0.001), "train")[:8192]) // EACH
    for stretch in np.split(labels, 2):
        shares = np.bincount(stretch, minlength=CLASSES) / len(stretch)
        assert np.abs(shares - 1 / CLASSES).max() < shift / CLASSES * 5
    if not block_rows:  # neighbours are as often of one class as chance has it: 1 in 20
        assert abs(np.mean(labels[1:] == labels[:-1]) - 1 / CLASSES) < 0.01


def test_the_seed_is_the_order():
    first = order(planned(Listed(), seed=3), "train")
    assert order(planned(Listed(), seed=3), "train") == first != order(planned(Listed(), seed=4), "train")
    assert planned(Listed(), seed=3).sha256 != planned(Listed(), seed=4).sha256


class Other(Listed):
    layout = "other"


class Renamed(Listed):
    classes = [SynsetClass(f"n{i:02d}", "words") for i in range(CLASSES)]


@pytest.mark.parametrize("other", [
    lambda: planned(Listed(size=2)), lambda: planned(Other()), lambda: planned(Renamed()),
    lambda: planned(Listed(), seed=1), lambda: planned(Listed(), store="raw"), lambda: planned(Listed(), hold_out=0.2),
], ids=["images", "layout", "classes", "seed", "store", "hold_out"])
def test_plans_differ_in_all_that_shards_depend_on(other):
    assert planned(Listed()).sha256 == planned(Listed()).sha256 != other().sha256


def test_plans_differ_in_the_encoding_of_jpegs_only(monkeypatch):
    jpeg, raw = planned(Listed()).sha256, planned(Listed(), store="raw").sha256
    monkeypatch.setattr(images, "ENCODING", "jpeg, quality 1")
    assert planned(Listed()).sha256 != jpeg and planned(Listed(), store="raw").sha256 == raw


@pytest.mark.parametrize("block_rows", [0, 100])
def test_both_stores_have_one_order(block_rows):
    jpeg, raw = (planned(Listed(block_rows), store=store) for store in ("jpeg", "raw"))
    for split in ("train", "val"):
        assert order(jpeg, split) == order(raw, split)


def test_rows_of_a_block_share_few_shards():
    """Reading a row group for each of its rows would read a Parquet file a hundred times."""
    plan = planned(Listed(block_rows=100), hold_out=0.001)
    shards = [shard for shard in plan.shards() if shard.split == "train"]
    reads = sum(len({entry.block for entry in plan.entries(shard)}) for shard in shards)
    assert reads <= 100 + 2
