"""What two processes of one host tell each other in memory that both map, within microseconds: how far each is."""

from __future__ import annotations

import json
import mmap
import os
import select
import time
import zlib
from contextlib import ExitStack

import numpy as np
from torch.distributed import Store

from model.errors import PeerError, reason
from model.exchange.meeting import swapped

RING = 64  # a process is never so many messages ahead: each is a swap
EAGER_LOOKS = 2000  # about a millisecond; then the processor is left to others between looks


class Signals:
    """Process `rank` (0 or 1) of two sends messages 1, 2, ..., each with a name, and waits for the other's."""

    def __init__(self, store: Store, rank: int, timeout_s: float):
        """`store` is both processes'. PeerError if the other does not come within `timeout_s`."""
        self._rank, self._timeout_s = rank, timeout_s
        try:
            with ExitStack() as stack:
                place = None
                if rank == 0:
                    file = stack.enter_context(open(os.memfd_create("alexnet"), "r+b"))  # no kill can leave it behind
                    place = file.fileno()
                    os.posix_fallocate(place, 0, 2 * (1 + RING) * 8)  # now: later a lack of memory is SIGBUS
                peer, place = json.loads(swapped(store, rank, "signals", json.dumps([os.getpid(), place]), timeout_s))
                if rank == 1:
                    file = stack.enter_context(open(f"/proc/{peer}/fd/{place}", "r+b"))
                memory = mmap.mmap(file.fileno(), 0)
                swapped(store, rank, "signals opened", "", timeout_s)
            self._peer = os.pidfd_open(peer)
        except (OSError, AttributeError, ValueError) as error:  # a Python may lack pidfd_open
            raise PeerError(f"no connection to the other tower ({reason(error)})") from None
        words = np.frombuffer(memory, np.int64).reshape(2, 1 + RING)  # of each process: the last number, then names
        self._mine, self._theirs = words[rank], words[1 - rank]
        self._alive = select.poll()
        self._alive.register(self._peer, select.POLLIN)  # readable once the process has ended

    def send(self, number: int, name: str) -> None:
        self._mine[1 + number % RING] = zlib.crc32(name.encode())
        self._mine[0] = number  # seen after the name: x86 keeps the order of stores

    def wait(self, number: int, name: str) -> None:
        """Return when the other process has sent message `number`; PeerError if it died, is late, or at another."""
        looks, deadline = 0, time.monotonic() + self._timeout_s
        while self._theirs[0] < number:
            looks += 1
            if looks < EAGER_LOOKS:
                continue
            if looks % 100 == 0:
                if self._alive.poll(0) and self._theirs[0] < number:  # it may have sent and ended since the last look
                    raise PeerError(f"the other tower died (waiting for {name})")
                if time.monotonic() > deadline:
                    raise PeerError(f"the other tower sent nothing for {self._timeout_s:g} s (waiting for {name}): it "
                                    "hangs or has been stopped")
            time.sleep(50e-6)
        if self._theirs[1 + number % RING] != zlib.crc32(name.encode()):
            raise PeerError(f"the towers are out of step: this one is at {name}, the other elsewhere")
