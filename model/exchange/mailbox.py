"""A mailbox: the peer's thread puts tensors in, the tower takes them out, in order."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from model.errors import PeerError


class Mailbox:
    def __init__(self):
        self._arrived = threading.Condition()
        self._messages: dict[int, tuple[str, Tensor, torch.cuda.Event | None]] = {}
        self._failure: str | None = None

    def put(self, number: int, name: str, tensor: Tensor) -> None:
        """Called for the peer, on another thread. On CUDA also on another stream, whose work `take` waits for."""
        written = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
        with self._arrived:
            self._messages[number] = name, tensor, written
            self._arrived.notify_all()

    def take(self, number: int, name: str, timeout_s: float) -> Tensor:
        """Return message `number`; PeerError if the peer failed, is late, or sent something else."""
        with self._arrived:
            self._arrived.wait_for(lambda: number in self._messages or self._failure, timeout_s)
            if number not in self._messages:
                raise PeerError(self._failure or f"the other tower sent nothing for {timeout_s:g} s "
                                                 f"(waiting for {name}): it hangs or has been stopped")
            sent_name, tensor, written = self._messages.pop(number)
        if sent_name != name:
            raise PeerError(f"the towers are out of step: this one is at {name}, the other at {sent_name}")
        if written is not None:
            stream = torch.cuda.current_stream(tensor.device)
            stream.wait_event(written)
            tensor.record_stream(stream)
        return tensor

    def fail(self, reason: str) -> None:
        """Wake whoever waits, now and later, with PeerError(reason). What has arrived can still be taken."""
        with self._arrived:
            self._failure = self._failure or reason
            self._arrived.notify_all()
