"""What the two towers say to each other: one small object that swaps tensors with the peer.

Every message is a swap: both towers send a tensor of the same shape at the same point of the program, forward as well
as backward (model.joined). Transports (rpc, cuda_ipc, collectives, local) only say how `begin` moves bytes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor
from torch.profiler import record_function


class Pending(Protocol):
    """A swap that has begun."""

    def wait(self) -> Tensor:
        """Return the peer's tensor. Raises PeerError where it does not come in time."""


class Recorder(Protocol):
    """Takes swaps down in place of doing them (model.captured)."""

    def begin(self, x: Tensor, name: str) -> object: ...

    def wait(self, begun: object) -> Tensor: ...

    def swap(self, x: Tensor, name: str) -> Tensor: ...


class Exchange(ABC):
    """The link of tower `tower` (0 or 1) to its peer."""

    def __init__(self, tower: int):
        self.tower = tower
        # Time in which the host had nothing to do but wait for the peer. (On a GPU the arithmetic that is
        # queued there goes on meanwhile.)
        self.waited_s = 0.0
        self.recording: Recorder | None = None  # while a step is recorded, what stands in for the transport

    @abstractmethod
    def begin(self, x: Tensor, name: str) -> Pending:
        """Send x and ask for the peer's tensor of the same shape.

        x must not be written to before a message has come that the peer sent after it had received x.

        `name` says what is swapped; the peer must be swapping the same.
        """

    def close(self) -> None:
        """Part in good order: both towers call it when they are done."""

    def swap(self, x: Tensor, name: str) -> Tensor:
        """Return the peer's tensor for x."""
        if self.recording is not None:
            return self.recording.swap(x.detach(), name)
        return self.received(self.begin(x.detach(), name))

    def start(self, x: Tensor, name: str) -> object:
        """Begin to swap x; `finish` is to be given what this returns."""
        return (self.recording or self).begin(x.detach(), name)

    def finish(self, started: object) -> Tensor:
        """Return the peer's tensor of a swap that `start` began."""
        return self.received(started) if self.recording is None else self.recording.wait(started)

    def received(self, pending: Pending) -> Tensor:
        """Return the peer's tensor of a swap that has begun."""
        began = time.perf_counter()
        with record_function("wait for the other tower"):
            received = pending.wait()
        self.waited_s += time.perf_counter() - began
        return received


def to_wire(x: Tensor) -> Tensor:
    """Return x as contiguous memory; images keep channels last, which costs no copy where they are so."""
    return (x.movedim(1, -1) if x.dim() == 4 else x).contiguous()


def from_wire(x: Tensor) -> Tensor:
    return x.movedim(-1, 1) if x.dim() == 4 else x
