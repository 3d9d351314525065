"""The exchange over torch.distributed.rpc: each tower pushes its tensors into a mailbox at its peer.

Neither RRefs nor distributed autograd take part: documented as unsupported with CUDA tensors, and a
driver that orchestrates is slower. Both towers are peers, each with a graph and an optimizer of its own.
"""

from __future__ import annotations

import collections
import warnings
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Store, register_rendezvous_handler, rpc

from model.errors import PeerError, reason
from model.exchange import Exchange, Pending, from_wire, to_wire
from model.exchange.calls import allow_only
from model.exchange.listeners import deafen, listening
from model.exchange.mailbox import Mailbox
from model.exchange.meeting import swapped

# What the peer's calls reach in this process. Set before RPC starts, so no message finds it missing.
_inbox: Mailbox
_until_close: torch.futures.Future
_store: Store


def deliver(number: int, name: str, tensor: Tensor) -> None:
    """Run here by the peer: put its message into this tower's mailbox."""
    _inbox.put(number, name, tensor)


@rpc.functions.async_execution
def hold() -> torch.futures.Future:
    """Run here by the peer: answered only when this tower parts in good order.

    A call that never ends is how the peer learns of this process's death: the failure of the
    connection fails it at once, while a mailbox would go on waiting.
    """
    return _until_close


def _rendezvous(url: str, **_):
    yield _store, -1, -1  # rank and size are given to init_rpc


register_rendezvous_handler("alexnet", _rendezvous)


class RpcExchange(Exchange):
    """Tower `tower` of two at rank `tower` of `store`. PeerError if the other does not join within `timeout_s`.

    With `staged`, CUDA tensors travel through the CPU's memory; without, from device to device.
    `idle_cores` says whether a core can be spared for the faster transport, which polls.
    """

    def __init__(self, store: Store, tower: int, device: torch.device, timeout_s: float,
                 staged: bool = False, idle_cores: bool = False):
        global _inbox, _until_close, _store
        super().__init__(tower)
        self._inbox = _inbox = Mailbox()
        self._until_close = _until_close = torch.futures.Future()
        _store = store
        self._device, self._staged, self._timeout_s = device, staged and device.type == "cuda", timeout_s
        self._begun = 0
        self._sending: collections.deque[torch.futures.Future] = collections.deque()
        names = "tower0", "tower1"
        self._peer = names[1 - tower]
        options = _options(timeout_s, idle_cores)
        # init_rpc itself would wait 24 days for a peer that stopped just before it.
        rpc.constants.DEFAULT_PROCESS_GROUP_TIMEOUT = timedelta(seconds=timeout_s)
        peer_device = torch.device(swapped(store, tower, "device", str(device), timeout_s))
        allow_only(deliver, hold)
        others = listening()
        try:
            if device.type == "cuda" and not staged:
                options.set_device_map(self._peer, {device: peer_device})
            with warnings.catch_warnings():  # of torch about its own call (pytorch issue 149393)
                warnings.filterwarnings("ignore", "You are using a Backend", UserWarning)
                rpc.init_rpc(names[tower], rank=tower, world_size=2, rpc_backend_options=options)
        except RuntimeError as error:
            raise PeerError(f"no connection to the other tower ({reason(error)})") from None
        # Both towers have all their connections now. C++ would run any operator of torch for whoever came later.
        deafen(listening() - others)
        # timeout=0: never. Both the peer's death and a broken connection end this call with an error.
        rpc.rpc_async(self._peer, hold, timeout=0).add_done_callback(self._peer_gone)

    def begin(self, x: Tensor, name: str) -> Pending:
        while self._sending and self._sending[0].done():
            try:
                self._sending.popleft().value()
            except RuntimeError as error:
                raise PeerError(f"a message to the other tower was lost ({reason(error)})") from None
        self._begun += 1
        wire = to_wire(x)
        wire = wire.cpu() if self._staged else wire
        self._sending.append(rpc.rpc_async(self._peer, deliver, (self._begun, name, wire), timeout=self._timeout_s))
        return _Message(self, self._begun, name)

    def close(self) -> None:
        self.swap(torch.zeros(1), "good-bye")
        self._until_close.set_result(None)
        rpc.shutdown()

    def _peer_gone(self, held: torch.futures.Future) -> None:
        try:
            held.value()
        except RuntimeError as error:
            self._inbox.fail(f"the other tower died ({reason(error)})")


class _Message:
    def __init__(self, exchange: RpcExchange, number: int, name: str):
        self.exchange, self.number, self.name = exchange, number, name

    def wait(self) -> Tensor:
        exchange = self.exchange
        wire = exchange._inbox.take(self.number, self.name, exchange._timeout_s)
        return from_wire(wire.to(exchange._device) if exchange._staged else wire)


def _options(timeout_s: float, idle_cores: bool) -> rpc.TensorPipeRpcBackendOptions:
    settings = {"num_worker_threads": 4, "rpc_timeout": timeout_s, "init_method": "alexnet://"}
    if not idle_cores:
        # The shared-memory transport's thread polls without rest and takes a core from the arithmetic.
        try:
            return rpc.TensorPipeRpcBackendOptions(**settings, _transports=["uv"])
        except TypeError:
            pass  # a private keyword of torch's: the default serves, only slower
    return rpc.TensorPipeRpcBackendOptions(**settings)
