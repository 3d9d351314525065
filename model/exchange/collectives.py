"""The exchange over a c10d process group: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import PeerError, reason
from model.exchange import Exchange, Pending, from_wire, to_wire


class CollectiveExchange(Exchange):
    """Tower `tower` of the two ranks of `group` (default: the world)."""

    def __init__(self, tower: int, timeout_s: float, group: dist.ProcessGroup | None = None):
        super().__init__(tower)
        self._timeout_s, self._group = timeout_s, group

    def begin(self, x: Tensor, name: str) -> Pending:
        wire = to_wire(x)
        return _Transfer(self, wire, name)


class _Transfer:
    def __init__(self, exchange: CollectiveExchange, wire: Tensor, name: str):
        self.exchange, self.name = exchange, name
        self.wire, self.received = wire, torch.empty_like(wire)  # held until the transfer is over
        peer = 1 - exchange.tower
        both = [dist.P2POp(dist.isend, wire, group=exchange._group, group_peer=peer),
                dist.P2POp(dist.irecv, self.received, group=exchange._group, group_peer=peer)]
        try:
            self.works = dist.batch_isend_irecv(both)
        except RuntimeError as error:
            raise self._lost(error) from None

    def wait(self) -> Tensor:
        limit_s = self.exchange._timeout_s
        try:
            deadline = time.monotonic() + limit_s
            while self.wire.is_cuda and not all(work.is_completed() for work in self.works):
                # NCCL's own wait returns at once and leaves a dead peer to a watchdog that aborts the process.
                if time.monotonic() > deadline:
                    raise PeerError(f"the other tower sent nothing for {limit_s:g} s (waiting for {self.name})")
                time.sleep(20e-6)
            for work in self.works:
                work.wait(timedelta(seconds=limit_s))
        except PeerError:
            raise
        except RuntimeError as error:
            raise self._lost(error) from None
        return from_wire(self.received)

    def _lost(self, error: Exception) -> PeerError:
        return PeerError(f"the other tower died or hangs (waiting for {self.name}: {reason(error)})")
