"""How two processes of one host tell each other how far they are."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from model.errors import PeerError
from model.exchange.signals import RING, Signals


@pytest.fixture
def pair() -> list[Signals]:
    return pair_of(timeout_s=5)


def pair_of(timeout_s: float) -> list[Signals]:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: Signals(store, rank, timeout_s), (0, 1)))


def test_a_message_is_heard_after_it_was_sent(pair):
    heard = []

    def listen():
        for number in range(1, 3 * RING):
            pair[1].wait(number, f"message {number}")
            heard.append((number, sent))
            pair[1].send(number, f"message {number}")

    listener = threading.Thread(target=listen)
    listener.start()
    for sent in range(1, 3 * RING):
        if sent == 2:
            time.sleep(0.05)  # longer than the eager looks
            assert heard == [(1, 1)] or heard == [(1, 2)]
        pair[0].send(sent, f"message {sent}")
        pair[0].wait(sent, f"message {sent}")
    listener.join()
    assert [number for number, _ in heard] == list(range(1, 3 * RING))
    assert all(sent_by_then >= number for number, sent_by_then in heard)


def test_another_message_than_expected_is_told(pair):
    pair[0].send(1, "fc6")
    with pytest.raises(PeerError, match="out of step: this one is at fc7"):
        pair[1].wait(1, "fc7")


def test_silence_is_told_in_time():
    ends, began = pair_of(timeout_s=0.2), time.perf_counter()
    with pytest.raises(PeerError, match="sent nothing for 0.2 s .waiting for conv3.: it hangs"):
        ends[0].wait(1, "conv3")
    assert time.perf_counter() - began < 2


def test_nobody_comes():
    with pytest.raises(PeerError, match="the other tower died, or said nothing for 0.2 s .waiting for signals"):
        Signals(dist.HashStore(), 1, timeout_s=0.2)


def _sends_one_and_dies(path: str) -> None:
    Signals(dist.FileStore(path, 2), 1, timeout_s=20).send(1, "conv3")
    os._exit(1)


def test_death_is_told_at_once(tmp_path):
    path = str(tmp_path / "store")
    process = multiprocessing.get_context("spawn").Process(target=_sends_one_and_dies, args=(path,))
    process.start()
    signals = Signals(dist.FileStore(path, 2), 0, timeout_s=60)
    signals.wait(1, "conv3")
    began = time.perf_counter()
    with pytest.raises(PeerError, match="the other tower died .waiting for fc6"):
        signals.wait(2, "fc6")
    assert time.perf_counter() - began < 10
    process.join()
