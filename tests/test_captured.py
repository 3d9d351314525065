"""Which graphs and swaps a recorded step consists of, with graphs that only say when they would be replayed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from model.captured import EAGER_CALLS, CapturedPasses, Recording
from model.exchange import Exchange
from model.layers import Dropout
from model.optimizer import optimizer_of
from model.recipe import TINY
from model.tower import build
from model.training import TrainingStep


class Graph:
    log: list[str] = []

    def capture_begin(self, pool, capture_error_mode):
        assert pool in (None, "pool") and capture_error_mode == "thread_local"

    def capture_end(self):
        self.number = sum(entry.startswith("captured") for entry in self.log)
        self.log.append(f"captured {self.number}")

    def pool(self):
        return "pool"

    def replay(self):
        self.log.append(f"graph {self.number}")


class Stream:
    device = None

    def __init__(self, device=None, priority=0):
        pass

    def wait_stream(self, _):
        pass


class Transport(Exchange):
    """Answers the n-th message with n everywhere."""

    def __init__(self):
        super().__init__(tower=0)
        self.log, self.sent = Graph.log, 0

    def begin(self, x, name):
        self.sent += 1
        self.log.append(f"send {name}")
        number = self.sent

        class Pending:
            def wait(pending):
                self.log.append(f"wait {name}")
                return torch.full_like(x, number)

        return Pending()


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch):
    Graph.log = []
    for name, stand_in in (("CUDAGraph", Graph), ("Stream", Stream), ("current_stream", Stream),
                           ("stream", lambda _: nullcontext()), ("synchronize", lambda: None),
                           ("empty_cache", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)


def step_of_a_tower(exchange) -> TrainingStep:
    recipe = replace(TINY, dropout=0.5)
    network = build(recipe, 10, 0, exchange).train()
    return TrainingStep(network, optimizer_of(network, recipe), 0, exchange)


PIXELS, LABELS = torch.randn(2, 3, 224, 224), torch.tensor([1, 7])


def test_a_recorded_step_swaps_as_the_step_does():
    exchange = Transport()
    step = step_of_a_tower(exchange)
    step._both_passes(PIXELS, LABELS, 0)
    eager = list(Graph.log)
    Graph.log.clear()
    with Recording(exchange, lambda: None) as recording:
        step._both_passes(PIXELS, LABELS, 0)
    assert exchange.recording is None and not any(entry.startswith(("send", "wait")) for entry in Graph.log)
    graphs = len(Graph.log)
    for _ in range(2):
        Graph.log.clear()
        recording.replay()
        assert [entry for entry in Graph.log if not entry.startswith("graph")] == eager
        assert [entry for entry in Graph.log if entry.startswith("graph")] == [f"graph {i}" for i in range(graphs)]
        assert Graph.log[:4] == ["graph 0", "send conv3", "graph 1", "wait conv3"]
    swap = Graph.log.index("send loss")
    assert Graph.log[swap + 1] == "wait loss"  # nothing is computed between
    assert graphs == 1 + 2 * 5 + 4  # cut before and after conv3's swaps and those of gradients, once at the others


def test_what_is_received_lies_in_one_place():
    exchange, names = Transport(), ("conv3", "fc6")
    with Recording(exchange, lambda: None) as recording:
        x = torch.zeros(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        received = [recording.wait(recording.begin(x, names[0])), recording.swap(torch.zeros(5), names[1])]
    assert received[0].is_contiguous(memory_format=torch.channels_last)
    for first in (1, 3):
        recording.replay()
        assert [float(tensor.unique()) for tensor in received] == [first, first + 1]


def test_a_replay_is_given_the_batch_and_the_masks(monkeypatch):
    """After a few calls that are not recorded."""
    recipe, calls = replace(TINY, dropout=0.5), []
    network = build(recipe, 10, 0).train()

    def passes(pixels, labels, number):
        calls.append(number)
        return pixels.sum(), labels.sum()

    captured, given = CapturedPasses(network, lambda: None, None), []
    for number in range(EAGER_CALLS + 3):
        given.append(captured(passes, PIXELS + number, LABELS + number, number))
    assert calls == list(range(EAGER_CALLS + 1))  # the last of them recorded
    assert Graph.log.count("graph 0") == 3
    assert torch.equal(captured._images, network.laid_out(PIXELS + number)) and torch.equal(captured._labels, LABELS + number)
    drop6, drop7 = (layer for layer in network.modules() if isinstance(layer, Dropout))
    for layer, mask in zip((drop6, drop7), captured._masks):
        assert torch.equal(mask, layer.draw(torch.empty_like(mask), number)) and layer.drawn is None
    with pytest.raises(ValueError, match="a batch of shape .1, 3, 224, 224. after those of .2, 3"):
        captured(passes, PIXELS[:1], LABELS[:1], 9)
    captured._outputs[0].fill_(9)  # as the next replay does
    assert 9 not in [float(loss) for loss, _ in given]


def test_replays_leave_autograd_alone():
    """What is received is part of the recorded graph, which would grow by what is written there with every step."""
    exchange = Transport()
    step = step_of_a_tower(exchange)
    captured = CapturedPasses(step.network, lambda: None, exchange)
    for number in range(EAGER_CALLS + 1):
        captured(step._both_passes, PIXELS, LABELS, number)
    written = []
    copy = torch.Tensor.copy_
    torch.Tensor.copy_ = lambda self, other: written.append(self) or copy(self, other)
    try:
        captured(step._both_passes, PIXELS, LABELS, number + 1)
    finally:
        torch.Tensor.copy_ = copy
    assert len(written) >= 2 + 9  # the batch, and every swap's
    assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in written)
