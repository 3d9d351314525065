"""How the two processes give each other the crops that each has decoded (pipeline.pixels.shared)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from model.errors import PeerError, reason


class GlooSwap:
    """Between rank 0 and rank 1 of `group`, of gloo, which serves nothing else."""

    def __init__(self, rank: int, group: dist.ProcessGroup, timeout_s: float):
        self.rank, self._group, self._timeout = rank, group, timedelta(seconds=timeout_s)

    def begin(self, pictures: Tensor) -> Callable[[], None]:
        """Send half `rank` of pictures [N, ...], N even, and receive the other; the returned call waits for both.

        It raises PeerError where the other tower does not send in time.
        """
        halves, peer = pictures.chunk(2), 1 - self.rank
        try:
            works = dist.batch_isend_irecv([
                dist.P2POp(dist.isend, halves[self.rank], group=self._group, group_peer=peer),
                dist.P2POp(dist.irecv, halves[peer], group=self._group, group_peer=peer)])
        except RuntimeError as error:
            raise self._lost(error) from None

        def wait() -> None:
            try:
                for work in works:
                    work.wait(self._timeout)
            except RuntimeError as error:
                raise self._lost(error) from None

        return wait

    def _lost(self, error: Exception) -> PeerError:
        return PeerError(f"the other tower died or hangs (waiting for its half of the pictures: {reason(error)})")
