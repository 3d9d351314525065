"""The exchange of two processes of one host, on one GPU or two: each copies what it sends into memory of the other's.

CUDA lets a process map another's memory and wait for its events. The copy is queued on the sender's stream and the
receiver's stream waits for it; the hosts say no more to each other than that it has been queued.
"""

from __future__ import annotations

import json
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Store

from model.errors import PeerError, reason
from model.exchange import Exchange, Pending, from_wire
from model.exchange.signals import Signals

BUFFERS = 2  # of each message: the sender may be one swap ahead of what the receiver still reads


class CudaIpcExchange(Exchange):
    """Tower `tower` of two that have `store` in common, on `device`. PeerError if the other does not join in time.

    What `swap` and `finish` return is overwritten two swaps of the same name and shape later.
    """

    def __init__(self, store: Store, tower: int, device: torch.device, timeout_s: float):
        super().__init__(tower)
        self._store, self._device, self._timeout_s = store, device, timeout_s
        self._signals = Signals(store, tower, timeout_s)
        self._slots: dict[tuple, _Slot] = {}
        self._begun = 0

    def begin(self, x: Tensor, name: str) -> Pending:
        x = x.movedim(1, -1) if x.dim() == 4 else x  # images lie so in memory: copied as they are
        key = name, tuple(x.shape), x.dtype
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot(self, x, name)
        self._begun += 1
        received = slot.send(x)
        self._signals.send(self._begun, str(key))
        return _Message(self, self._begun, str(key), *received)

    def close(self) -> None:
        self.swap(torch.zeros(1, device=self._device), "good-bye")
        torch.cuda.synchronize(self._device)
        self._begun += 1
        self._signals.send(self._begun, "closed")  # neither frees memory that the other may be writing to
        self._signals.wait(self._begun, "closed")


class _Slot:
    """Memory of this process for what is received under a name, and the peer's for what is sent."""

    def __init__(self, exchange: CudaIpcExchange, x: Tensor, name: str):
        self.uses = 0
        device, store = exchange._device, exchange._store
        self.inbox = torch.empty(BUFFERS, *x.shape, dtype=x.dtype, device=device)
        self.sent = [torch.cuda.Event(interprocess=True) for _ in range(BUFFERS)]
        # Memory that was just freed and given to the inbox may still be read by what is queued.
        torch.cuda.synchronize(device)
        for event in self.sent:
            event.record()  # creates it
        number = len(exchange._slots)
        mine, theirs = (f"slot/{number}/{tower}" for tower in (exchange.tower, 1 - exchange.tower))
        shared = [field.hex() if isinstance(field, bytes) else field
                  for field in self.inbox.untyped_storage()._share_cuda_()]
        store.set(mine, json.dumps({"name": name, "shape": list(x.shape), "dtype": str(x.dtype), "storage": shared,
                                    "offset": self.inbox.storage_offset(),
                                    "events": [event.ipc_handle().hex() for event in self.sent]}))
        try:
            store.wait([theirs], timedelta(seconds=exchange._timeout_s))
        except RuntimeError as error:
            raise PeerError(f"the other tower died, or sent nothing for {exchange._timeout_s:g} s (waiting for {name}: "
                            f"{reason(error)})") from None
        told = json.loads(store.get(theirs))
        if (told["name"], told["shape"], told["dtype"]) != (name, list(x.shape), str(x.dtype)):
            raise PeerError(f"the towers are out of step: this one is at {name}, the other at {told['name']}")
        try:
            storage = torch.UntypedStorage._new_shared_cuda(
                *(bytes.fromhex(field) if isinstance(field, str) else field for field in told["storage"]))
            self.outbox = torch.empty(0, dtype=x.dtype, device=storage.device).set_(
                storage, told["offset"], self.inbox.shape, self.inbox.stride())
            self.received = [torch.cuda.Event.from_ipc_handle(device, bytes.fromhex(handle))
                             for handle in told["events"]]
        except RuntimeError as error:
            raise PeerError(f"this process cannot map the other's GPU memory ({reason(error)}); use --transport "
                            "rpc") from None

    def send(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Queue the copy; return where the peer's tensor will be, and the event after which it is."""
        buffer, self.uses = self.uses % BUFFERS, self.uses + 1
        self.outbox[buffer].copy_(x)
        self.sent[buffer].record()
        return self.inbox[buffer], self.received[buffer]


class _Message:
    def __init__(self, exchange: CudaIpcExchange, number: int, name: str, received: Tensor, written: torch.cuda.Event):
        self.exchange, self.number, self.name, self.received, self.written = exchange, number, name, received, written

    def wait(self) -> Tensor:
        self.exchange._signals.wait(self.number, self.name)
        torch.cuda.current_stream(self.exchange._device).wait_event(self.written)
        return from_wire(self.received)
