"""Both passes of a step as CUDA graphs: the GPU is sent a few launches in place of hundreds.

The whole network's passes are one graph. A tower's are cut where it sends to the other or waits for it; between two
graphs the exchange does what it always does.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import record_function

from model.exchange import Exchange, Pending
from model.layers import Dropout
from model.network import AlexNet

EAGER_CALLS = 3  # first: libraries choose and load kernels, the exchange finds memory, which a capture must not see
Passes = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class CapturedPasses:
    """`captured(passes, pixels, labels, number)` does what `passes` does, from the fourth call on by replaying it.

    `passes(images, labels, number)` sets gradients anew and returns the loss and how many labels came first; it reads
    nothing that moves but its arguments; images may be laid out by the network. What depends on `number`, the dropout
    masks, is drawn before a replay. `join` has the current stream wait for what `passes` may have started beside it.
    """

    def __init__(self, network: AlexNet, join: Callable[[], None], exchange: Exchange | None):
        self._network, self._join, self._exchange = network, join, exchange
        self._dropouts = [layer for layer in network.modules() if isinstance(layer, Dropout) and layer.p]
        self._recording: Recording | None = None
        # Of high priority: other streams are dealt out again and again, and RPC would be given the captured one.
        self._stream = torch.cuda.Stream(next(network.parameters()).device, priority=-1)
        self._calls = 0

    def __call__(self, passes: Passes, pixels: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        self._calls += 1
        if self._calls <= EAGER_CALLS:
            with _on(self._stream):
                return passes(pixels, labels, number)
        if self._recording is None:
            self._record(passes, pixels, labels, number)
        if pixels.shape != self._shape:
            raise ValueError(f"a batch of shape {list(pixels.shape)} after those of {list(self._shape)}")
        self._network.laid_out(pixels, self._images)
        self._labels.copy_(labels)
        for dropout, mask in zip(self._dropouts, self._masks):
            dropout.draw(mask, number)
        with record_function("replay"):
            self._recording.replay()
        return tuple(output.clone() for output in self._outputs)

    def _record(self, passes: Passes, pixels: Tensor, labels: Tensor, number: int) -> None:
        self._shape, self._images, self._labels = pixels.shape, self._network.laid_out(pixels), labels.clone()
        self._masks = [torch.empty(len(pixels), dropout.neurons, device=pixels.device) for dropout in self._dropouts]
        for dropout, mask in zip(self._dropouts, self._masks):
            dropout.drawn = mask
        recording = Recording(self._exchange, self._join)
        gc.collect()  # what is left of earlier calls would have this one wait for them
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph's memory is its own
        try:
            with _on(self._stream), recording:
                self._outputs = passes(self._images, self._labels, number)
        finally:
            for dropout in self._dropouts:
                dropout.drawn = None
        self._recording = recording


class Recording:
    """What is queued on a GPU in a `with` statement, as graphs, and the swaps of `exchange` between them.

    The current stream must not be the default one. Nothing is computed or sent meanwhile; `replay` does it. What is
    sent and received lies in the same place every time. It is written to again a step later, when the peer's messages
    that came since have shown that it was read.
    """

    def __init__(self, exchange: Exchange | None, join: Callable[[], None]):
        self._exchange, self._join = exchange, join
        self._parts: list[Callable[[], object]] = []  # replays, sends and waits in their order
        self._under_way: dict[int, Pending] = {}  # during a replay
        self._swaps = 0
        self._pool = None  # memory that the graphs share

    @torch.no_grad()
    def replay(self) -> None:
        for part in self._parts:
            part()

    def begin(self, x: Tensor, name: str) -> RecordedSwap:
        """Stand in for the exchange's `begin`."""
        self._close()
        swap = self._sent(x, name)
        self._open()
        return swap

    def wait(self, swap: RecordedSwap) -> Tensor:
        """Stand in for the exchange's wait."""
        self._close()
        received = self._received(swap)
        self._open()
        return received

    def swap(self, x: Tensor, name: str) -> Tensor:
        """Stand in for both, one right after the other."""
        self._close()
        received = self._received(self._sent(x, name))
        self._open()
        return received

    def _sent(self, x: Tensor, name: str) -> RecordedSwap:
        self._swaps += 1
        number = self._swaps

        def send() -> None:
            self._under_way[number] = self._exchange.begin(x, name)

        self._parts.append(send)
        return RecordedSwap(number, x)

    def _received(self, swap: RecordedSwap) -> Tensor:
        received = torch.empty_like(swap.x)

        def receive() -> None:
            received.copy_(self._exchange.received(self._under_way.pop(swap.number)))

        self._parts.append(receive)
        return received.detach()  # autograd would take this tensor for its own, and what is written to it for a step

    def __enter__(self) -> Recording:
        if self._exchange is not None:
            self._exchange.recording = self
        self._open()
        return self

    def __exit__(self, kind, *_) -> None:
        if self._exchange is not None:
            self._exchange.recording = None
        if kind is None:
            self._close()

    def _open(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, DALI's, may go on allocating memory meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _close(self) -> None:
        self._join()
        with warnings.catch_warnings():  # one wait may follow another with nothing between
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            self._graph.capture_end()
        self._pool = self._graph.pool()
        self._parts.append(self._graph.replay)


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Queue on `stream`, in the order of the current one; backward passes too, in this thread alone.

    A capture must begin and end in one thread, and libraries plan anew for each thread and stream: therefore the calls
    before it come here too.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
        yield
    current.wait_stream(stream)


class RecordedSwap:
    """A swap that has been begun in a recording."""

    def __init__(self, number: int, x: Tensor):
        self.number, self.x = number, x
