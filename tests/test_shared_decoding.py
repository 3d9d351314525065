"""Two processes that share the decoding see the batches that each would have decoded alone."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_loader import IMAGES, LIGHTING, MEAN, assert_same, images, raw  # noqa: F401  fixtures

from pipeline.batches import TrainingBatches
from pipeline.loader import TrainingLoader


class Swap:
    """Between two threads: each waits for the other at every batch."""

    def __init__(self, rank: int, shared: dict, barrier: threading.Barrier):
        self.rank, self._shared, self._barrier, self.sent = rank, shared, barrier, 0

    def begin(self, pictures: torch.Tensor):
        halves, number = pictures.chunk(2), self.sent
        self._shared[self.rank, number] = halves[self.rank].clone()
        halves[1 - self.rank].zero_()
        self.sent += 1

        def wait() -> None:
            self._barrier.wait(timeout=30)
            halves[1 - self.rank].copy_(self._shared[1 - self.rank, number])

        return wait


def swaps() -> tuple[Swap, Swap]:
    shared, barrier = {}, threading.Barrier(2)
    return Swap(0, shared, barrier), Swap(1, shared, barrier)


def first(stored, batches, count: int, swap=None, start: int = 0) -> list:
    with TrainingLoader(stored, MEAN, batches, start_step=start, swap=swap) as loader:
        return list(itertools.islice(loader, count))


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("mean_at", ["crop", "centre"])
def test_shared_batches_are_those_of_one_process(images, start, mean_at):  # noqa: F811
    batches = TrainingBatches(IMAGES, 6, seed=7, lighting=LIGHTING, mean_at=mean_at)
    alone, pair = first(images, batches, 7, start=start), swaps()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda swap: first(images, batches, 7, swap, start), pair))
    assert pair[0].sent == pair[1].sent == 8  # one in advance
    for shared in found:
        assert_same(shared, alone)


@pytest.mark.parametrize("batch_size, store", [(5, "jpeg"), (6, "raw")])
def test_odd_batches_and_raw_pixels_are_not_shared(images, raw, batch_size, store):  # noqa: F811
    batches, swap = TrainingBatches(IMAGES, batch_size, seed=7, lighting=LIGHTING), swaps()[0]
    stored = {"jpeg": images, "raw": raw}[store]
    assert_same(first(stored, batches, 3, swap), first(stored, batches, 3))
    assert swap.sent == 0


def test_a_peer_that_is_gone_ends_the_iteration(images):  # noqa: F811
    class Gone(Swap):
        def begin(self, pictures):
            def wait():
                raise RuntimeError("gone")
            return wait

    batches = TrainingBatches(IMAGES, 6, seed=7, lighting=LIGHTING)
    with pytest.raises(RuntimeError, match="gone"):
        first(images, batches, 1, Gone(0, {}, threading.Barrier(1)))
