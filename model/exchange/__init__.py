"""What the two towers say to each other: one small object that swaps tensors with the peer.

`swap` and `begin` move values; `start` and `finish` are the differentiable pair around them. Every
message is a swap: both towers send a tensor of the same shape at the same point of the program, forward
as well as backward. Transports (rpc, cuda_ipc, collectives, local) only say how `begin` moves bytes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
        """Return the peer's tensor for x. Not differentiable."""
        if self.recording is not None:
            return self.recording.swap(x.detach(), name)
        return self.received(self.begin(x.detach(), name))

    def start(self, x: Tensor, name: str) -> tuple[Tensor, _Token]:
        """Begin to swap x. Use the returned x in place of it: its gradient includes the peer's."""
        token = _Token(self, name)
        x, token.edge = _Start.apply(x, token)
        return x, token

    def finish(self, token: _Token) -> Tensor:
        """Return the peer's x; in backward its gradient is sent to the peer at once."""
        edge = token.edge
        del token.edge  # whose node holds the token: in a circle they would keep the step's memory until Python looks
        return _Finish.apply(edge, token)

    def received(self, pending: Pending) -> Tensor:
        """Return the peer's tensor of a swap that has begun."""
        began = time.perf_counter()
        with record_function("wait for the other tower"):
            received = pending.wait()
        self.waited_s += time.perf_counter() - began
        return received

    def _begin(self, x: Tensor, name: str) -> Pending:
        return (self.recording or self).begin(x, name)

    def _wait(self, pending: Pending) -> Tensor:
        return self.received(pending) if self.recording is None else self.recording.wait(pending)


class _Token:
    """Ties the two ends of one differentiable swap together."""

    def __init__(self, exchange: Exchange, name: str):
        self.exchange, self.name = exchange, name
        self.edge: Tensor  # empty; carries the order of the graph from _Start to _Finish
        self.pending: Pending  # the swap of activations, then that of gradients


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token: _Token):
        ctx.token = token
        token.pending = token.exchange._begin(x.detach(), token.name)
        return x.view_as(x), x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x: Tensor, _):
        from_peer = ctx.token.exchange._wait(ctx.token.pending)
        return from_peer.add_(grad_x), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, edge: Tensor, token: _Token):
        ctx.token = token
        return token.exchange._wait(token.pending)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_peer: Tensor):
        # Autograd runs what was recorded last first: this comes before the own half's backward,
        # which hides the transfer, and _Start.backward, which needs its outcome, comes after that.
        token = ctx.token
        token.pending = token.exchange._begin(grad_peer, f"gradient of {token.name}")
        return grad_peer.new_empty(0), None


def to_wire(x: Tensor) -> Tensor:
    """Return x as contiguous memory; images keep channels last, which costs no copy where they are so."""
    return (x.movedim(1, -1) if x.dim() == 4 else x).contiguous()


def from_wire(x: Tensor) -> Tensor:
    return x.movedim(-1, 1) if x.dim() == 4 else x
