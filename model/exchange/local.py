"""Both towers in one process, on two threads, or one of them alone: for tests and measurements."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from model.exchange import Exchange, Pending
from model.exchange.mailbox import Mailbox


class LocalExchange(Exchange):
    def __init__(self, tower: int, inboxes: tuple[Mailbox, Mailbox], timeout_s: float):
        super().__init__(tower)
        self._inbox, self._outbox, self._timeout_s = inboxes[tower], inboxes[1 - tower], timeout_s
        self._begun = 0

    def begin(self, x: Tensor, name: str) -> Pending:
        self._begun += 1
        self._outbox.put(self._begun, name, x.clone())
        return _Letter(self, self._begun, name)


class _Letter:
    def __init__(self, exchange: LocalExchange, number: int, name: str):
        self.exchange, self.number, self.name = exchange, number, name

    def wait(self) -> Tensor:
        return self.exchange._inbox.take(self.number, self.name, self.exchange._timeout_s)


def local_pair(timeout_s: float = 30) -> tuple[LocalExchange, LocalExchange]:
    """Return the two ends of one link. Each is to be used from a thread of its own."""
    inboxes = Mailbox(), Mailbox()
    return LocalExchange(0, inboxes, timeout_s), LocalExchange(1, inboxes, timeout_s)


class EchoExchange(Exchange):
    """A peer that answers with what it was sent, when a link would have brought it: one tower alone takes as long as
    beside an equal peer.

    A message takes `latency_s` and its bytes at `bytes_per_s`, while the tower goes on computing.
    """

    def __init__(self, tower: int, latency_s: float = 0.0, bytes_per_s: float = math.inf):
        super().__init__(tower)
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s
        self._link: torch.cuda.Stream | None = None
        self._cycles_per_s = 0.0
        self._echoes: dict[tuple[str, torch.Size], _EchoOnGpu] = {}  # a step later their memory is free again

    def begin(self, x: Tensor, name: str) -> Pending:
        seconds = self._latency_s + x.nbytes / self._bytes_per_s
        if not x.is_cuda:
            return _Echo(x.clone(), time.perf_counter() + seconds)
        if self._link is None:
            self._link = torch.cuda.Stream(x.device, priority=-1)
            self._cycles_per_s = _cycles_per_s()
        echo = self._echoes.get((name, x.shape))
        if echo is None:
            echo = self._echoes[name, x.shape] = _EchoOnGpu(torch.empty_like(x), torch.cuda.Event())
        self._link.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._link):
            torch.cuda._sleep(int(seconds * self._cycles_per_s))
            echo.x.copy_(x)
            echo.arrived.record()
        return echo


class _Echo:
    def __init__(self, x: Tensor, due: float):
        self.x, self.due = x, due

    def wait(self) -> Tensor:
        time.sleep(max(0.0, self.due - time.perf_counter()))
        return self.x


class _EchoOnGpu:
    def __init__(self, x: Tensor, arrived: torch.cuda.Event):
        self.x, self.arrived = x, arrived

    def wait(self) -> Tensor:
        torch.cuda.current_stream().wait_event(self.arrived)
        return self.x


def _cycles_per_s() -> float:
    """Return the rate of the clock that torch.cuda._sleep counts."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    began.record()
    torch.cuda._sleep(20_000_000)
    ended.record()
    ended.synchronize()
    return 20_000_000 / (began.elapsed_time(ended) / 1e3)
