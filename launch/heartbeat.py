"""Is everybody still there? Each process says so once a second, beside whatever it is doing.

A process that dies is noticed at once, by its connections. One that is stopped, or whose host is gone, closes none; and
how long its work may take nobody knows: others would have to wait for it for minutes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

from torch.distributed import Store

from launch.environment import end_stopped_siblings

EVERY_S, LIMIT_S = 1.0, 7.0
PARTED = b"parted"


class Heartbeat:
    """Of process `rank` of `size`. `store`, which process 0 has, is all processes', over a connection of its own.

    Where another process has been silent for LIMIT_S, this one ends with exit code 1.
    """

    def __init__(self, store: Store, rank: int, size: int):
        self._store, self._rank = store, rank
        self._parting = threading.Event()
        # By process, when it was last heard of. Where the store does not answer nobody is, and process 0 is the first.
        self._heard = {other: time.monotonic() for other in range(size) if other != rank}
        self._parted: set[int] = set()
        self._speaking = threading.Thread(target=self._speak, daemon=True)
        self._speaking.start()
        threading.Thread(target=self._judge, daemon=True).start()  # the other waits as long as the store does

    def part(self) -> None:
        """Stop in good order; all processes have to come here before the store is closed."""
        self._parting.set()
        self._speaking.join()

    def _speak(self) -> None:
        """Say that this process is there, and hear the others."""
        number, said = 0, {}
        with suppress(RuntimeError):  # the store is gone: its process is silent from now on
            while not self._parting.wait(EVERY_S):
                number += 1
                self._store.set(f"beat/{self._rank}", str(number))
                for other in self._heard:
                    key = f"beat/{other}"
                    new = self._store.get(key) if self._store.check([key]) else None  # it may not have begun yet
                    if new == PARTED:
                        self._parted.add(other)
                    if new is None or new != said.get(other):
                        self._heard[other] = time.monotonic()
                    said[other] = new
            self._store.set(f"beat/{self._rank}", PARTED.decode())

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._parting.wait(EVERY_S / 2):
            now = time.monotonic()
            if now - before > LIMIT_S / 2:  # this process did not run itself, and has heard nobody
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            for other, heard in self._heard.items():
                if now - heard > LIMIT_S and other not in self._parted:
                    end_stopped_siblings()  # torchrun would wait for them to end
                    if self._rank == min(process for process in (self._rank, *self._heard) if process != other):
                        print(f"alexnet: process {other} has been silent for {LIMIT_S:g} s: it hangs, was stopped, or its "
                              "host is gone", file=sys.stderr, flush=True)
                    os._exit(1)
