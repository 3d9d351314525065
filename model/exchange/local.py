"""Both towers in one process, on two threads, or one of them alone: for tests and measurements."""

from __future__ import annotations

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
    """A peer that answers at once with what it was sent: one tower alone costs what it costs beside an equal peer."""

    def begin(self, x: Tensor, name: str) -> Pending:
        return _Echo(x.clone())


class _Echo:
    def __init__(self, x: Tensor):
        self.x = x

    def wait(self) -> Tensor:
        return self.x
