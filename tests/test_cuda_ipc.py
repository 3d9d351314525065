"""The exchange through GPU memory, with the CPU's in its place: both ends in one process, on two threads."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from model.errors import PeerError
from model.exchange.cuda_ipc import BUFFERS, CudaIpcExchange

CPU = torch.device("cpu")


class Event:
    """Known to both ends by its handle. A wait for one that has not been recorded since it was last waited for fails."""

    known: dict[bytes, Event] = {}

    def __init__(self, interprocess: bool):
        assert interprocess
        self.records = self.waits = 0
        self.handle = len(self.known).to_bytes(4, "big")
        self.known[self.handle] = self

    def ipc_handle(self) -> bytes:
        return self.handle

    @classmethod
    def from_ipc_handle(cls, device, handle: bytes) -> Event:
        return cls.known[handle]

    def record(self) -> None:
        self.records += 1

    def wait(self) -> None:
        self.waits += 1
        assert self.records > self.waits  # the first record made the event


class StreamOfTwoGpus:
    wait_event = staticmethod(Event.wait)


class StreamOfOneGpu:
    """Event.synchronize is called in place of wait_event, which is not there."""


@pytest.fixture(params=[1, 2], ids=["one GPU", "two GPUs"])
def shared_memory(request, monkeypatch):
    storages: list[torch.UntypedStorage] = []
    gpus, stream = itertools.count(), StreamOfOneGpu
    if request.param == 1:
        monkeypatch.setattr(Event, "synchronize", Event.wait, raising=False)
    else:
        stream = StreamOfTwoGpus

    def share(storage):
        storages.append(storage)
        return 0, len(storages).to_bytes(4, "big"), storage.nbytes()

    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", share, raising=False)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda",
                        staticmethod(lambda device, handle, size: storages[int.from_bytes(handle, "big") - 1]),
                        raising=False)
    for name, stand_in in (("Event", Event), ("synchronize", lambda device: None),
                           ("current_stream", lambda device: stream()),
                           ("get_device_properties", lambda device: SimpleNamespace(uuid=next(gpus) % request.param))):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return storages


def both(work, timeout_s: float = 5):
    """Return work(end) of the two ends of a new link, at the same time."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda tower: work(CudaIpcExchange(store, tower, CPU, timeout_s)), (0, 1)))


def test_each_receives_what_the_other_sent(shared_memory):
    images = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)

    def swaps(exchange):
        found = []
        for step in range(5):
            pending = [exchange.begin(images * (exchange.tower + 1) + step, "conv3"),
                       exchange.begin(torch.full((3,), 10.0 * step + exchange.tower), "fc6")]
            found += [exchange.received(one).clone() for one in pending]
        exchange.close()
        return found

    for tower, found in enumerate(both(swaps)):
        peer = 1 - tower
        for step in range(5):
            assert torch.equal(found[2 * step], images * (peer + 1) + step)
            assert torch.equal(found[2 * step + 1], torch.full((3,), 10.0 * step + peer))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert len(shared_memory) == 2 * 3  # a slot at each end for conv3, fc6 and the good-bye


def test_what_was_received_stays_until_the_swap_after_the_next(shared_memory):
    def swaps(exchange):
        return [exchange.swap(torch.full((2,), float(step)), "fc7") for step in range(BUFFERS + 1)]

    for found in both(swaps):
        assert [float(tensor[0]) for tensor in found] == [2, 1, 2]  # the first was overwritten by the last


@pytest.mark.parametrize("names, shapes", [(("fc6", "fc7"), ((2,), (2,))), (("fc6", "fc6"), ((2,), (3,)))])
def test_other_messages_are_told(shared_memory, names, shapes):
    with pytest.raises(PeerError, match="out of step: this one is at fc[67], the other at fc[67]"):
        both(lambda exchange: exchange.swap(torch.zeros(shapes[exchange.tower]), names[exchange.tower]))


def test_memory_that_cannot_be_shared_is_told_to_both(shared_memory, monkeypatch):
    def share(storage):
        raise RuntimeError("invalid argument\nand what torch adds")

    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", share)
    told = []

    def swaps(exchange):
        with pytest.raises(PeerError, match="cannot be shared .* .invalid argument.; use --transport rpc") as error:
            exchange.swap(torch.zeros(2), "conv3")
        told.append(str(error.value))

    both(swaps)
    assert len(told) == 2
