"""The exchange over a c10d process group: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

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
        try:
            for work in self.works:
                work.wait(timedelta(seconds=self.exchange._timeout_s))
        except RuntimeError as error:
            raise self._lost(error) from None
        return from_wire(self.received)

    def _lost(self, error: Exception) -> PeerError:
        return PeerError(f"the other tower died or hangs (waiting for {self.name}: {reason(error)})")
