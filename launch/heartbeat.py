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

    Process 0 hears all others, and they hear it. Where one has been silent for LIMIT_S, who hears it ends with exit
    code 1; and with that end everybody does.
    """

    def __init__(self, store: Store, rank: int, size: int):
        self._store, self._rank = store, rank
        self._parting, self._judging = threading.Event(), True
        # By process, when it was last heard of. Where the store does not answer, nobody is.
        self._heard = dict.fromkeys(range(1, size) if rank == 0 else [0], time.monotonic())
        self._parted: set[int] = set()
        self._speaking = threading.Thread(target=self._speak, daemon=True)
        self._speaking.start()
        threading.Thread(target=self._judge, daemon=True).start()  # the other waits as long as the store does

    def part(self) -> None:
        """Stop in good order; all processes have to come here before the store is closed."""
        self._parting.set()
        self._speaking.join()

    def judge_no_more(self) -> None:
        """Go on saying that this process is there, and leave it to itself how it ends."""
        self._judging = False

    def _speak(self) -> None:
        """Say that this process is there, and hear others."""
        number, said = 0, {}
        with suppress(RuntimeError):  # the store is gone: its process is silent from now on
            while not self._parting.wait(EVERY_S):
                number += 1
                self._store.set(f"beat/{self._rank}", str(number))
                for other, new in self._heard_now().items():
                    if new == PARTED:
                        self._parted.add(other)
                    if new is None or new != said.get(other):
                        self._heard[other] = time.monotonic()
                    said[other] = new
            self._store.set(f"beat/{self._rank}", PARTED.decode())

    def _heard_now(self) -> dict[int, bytes | None]:
        """Return what each process says; None where it has not begun."""
        keys = {other: f"beat/{other}" for other in self._heard}
        if self._store.check(list(keys.values())):
            return dict(zip(keys, self._store.multi_get(list(keys.values()))))
        return {other: self._store.get(key) if self._store.check([key]) else None for other, key in keys.items()}

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._parting.wait(EVERY_S / 2):
            now = time.monotonic()
            if now - before > LIMIT_S / 2:  # this process did not run itself, and has heard nobody
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            silent_s = {other: now - heard for other, heard in self._heard.items() if other not in self._parted}
            if max(silent_s.values(), default=0) > LIMIT_S and self._judging:
                silent = [other for other, seconds in silent_s.items() if seconds > LIMIT_S - 2 * EVERY_S]
                end_stopped_siblings()  # torchrun would wait for them to end
                local_rank = int(os.environ.get("LOCAL_RANK", self._rank))
                # One of those of a host that are left tells: where process 0 is silent, the next one of its own host.
                if local_rank == (1 if 0 in silent and self._rank == local_rank else 0):
                    print(f"alexnet: {_listed(silent)} been silent for {LIMIT_S:g} s: hanging, or stopped, or the host "
                          "is gone", file=sys.stderr, flush=True)
                os._exit(1)


def _listed(processes: list[int]) -> str:
    if len(processes) == 1:
        return f"process {processes[0]} has"
    return f"processes {', '.join(map(str, processes))} have"
