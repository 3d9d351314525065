"""The exchange of two processes of one host, on one GPU or two: each copies what it sends into memory of the other's.

CUDA lets a process map another's memory and wait for its events. The copy is queued on the sender's stream and the
receiver's stream waits for it; the hosts say no more to each other than that it has been queued.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor
from torch.distributed import Store

from model.errors import PeerError, reason
from model.exchange import Exchange, Pending, from_wire
from model.exchange.meeting import swapped
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
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        # Two processes have a GPU in turn. One whose stream waits for the other's event would keep it for its whole
        # turn, some 2 ms, with nothing to do; so there the host waits, and nothing is queued meanwhile.
        self._one_gpu = swapped(store, tower, "gpu", gpu, timeout_s) == gpu
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
        self.inbox = torch.empty(BUFFERS, *x.shape, dtype=x.dtype, device=exchange._device)
        about = {"name": name, "shape": list(x.shape), "dtype": str(x.dtype)}
        try:
            mine = about | self._shared()
        except RuntimeError as error:
            mine = about | {"failed": reason(error)}
        theirs = json.loads(swapped(exchange._store, exchange.tower, f"slot/{len(exchange._slots)}", json.dumps(mine),
                                    exchange._timeout_s, about=name))
        if any(theirs[key] != value for key, value in about.items()):
            raise PeerError(f"the towers are out of step: this one is at {name}, the other at {theirs['name']}")
        try:
            for told in (mine, theirs):
                if "failed" in told:
                    raise RuntimeError(told["failed"])
            self._map(theirs)
        except RuntimeError as error:
            raise PeerError(f"GPU memory cannot be shared between the processes here ({reason(error)}); use "
                            "--transport rpc") from None

    def _shared(self) -> dict:
        """Return what the peer needs to write to the inbox and to know when it has been written to."""
        self.sent = [torch.cuda.Event(interprocess=True) for _ in range(BUFFERS)]
        torch.cuda.synchronize(self.inbox.device)  # this memory may have been another's, which is still being read
        for event in self.sent:
            event.record()  # creates it
        storage = [field.hex() if isinstance(field, bytes) else field
                   for field in self.inbox.untyped_storage()._share_cuda_()]
        return {"storage": storage, "offset": self.inbox.storage_offset(),
                "events": [event.ipc_handle().hex() for event in self.sent]}

    def _map(self, theirs: dict) -> None:
        storage = torch.UntypedStorage._new_shared_cuda(
            *(bytes.fromhex(field) if isinstance(field, str) else field for field in theirs["storage"]))
        self.outbox = torch.empty(0, dtype=self.inbox.dtype, device=storage.device).set_(
            storage, theirs["offset"], self.inbox.shape, self.inbox.stride())
        self.received = [torch.cuda.Event.from_ipc_handle(self.inbox.device, bytes.fromhex(handle))
                         for handle in theirs["events"]]

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
        if self.exchange._one_gpu:
            self.written.synchronize()
        else:
            torch.cuda.current_stream(self.exchange._device).wait_event(self.written)
        return from_wire(self.received)
