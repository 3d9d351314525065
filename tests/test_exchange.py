"""The exchange and the shared softmax: gradients by gradcheck, and how a broken link ends."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import joined
from model.errors import PeerError
from model.exchange.local import EchoExchange, local_pair
from model.exchange.mailbox import Mailbox
from model.joined import JoinedConv2d, JoinedLinear, _Swap
from model.softmax import cross_entropy, probabilities, rank_of_label


def on_two_threads(work):
    """Run work(0) and work(1) at once; return both results or raise what one of them raised."""
    results, errors = [None, None], []

    def run(tower):
        try:
            results[tower] = work(tower)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(tower,)) for tower in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def as_one_function(tower_function):
    """Make one differentiable function of both towers' inputs from what each tower computes on its thread."""

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x0, x1):
            exchanges = local_pair()
            ctx.inputs = [x.detach().requires_grad_() for x in (x0, x1)]
            with torch.enable_grad():
                ctx.outputs = on_two_threads(
                    lambda t: torch.enable_grad()(tower_function)(ctx.inputs[t], exchanges[t]))
            return tuple(y.detach() for y in ctx.outputs)

        @staticmethod
        def backward(ctx, *gradients):
            on_two_threads(lambda t: torch.autograd.backward(ctx.outputs[t], gradients[t],
                                                            retain_graph=True, inputs=[ctx.inputs[t]]))
            gradients, ctx.inputs[0].grad, ctx.inputs[1].grad = [x.grad for x in ctx.inputs], None, None
            return tuple(gradients)

    return Both.apply


def test_gradient_of_a_swap():
    def tower(x, exchange):
        x, peer = _Swap.apply(x, exchange, "test")
        return (x * (exchange.tower + 2)).sin() * peer**3

    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in (0, 1)]
    assert torch.autograd.gradcheck(as_one_function(tower), inputs)


JOINED = {  # layers and their input's shape
    "linear": (lambda exchange: JoinedLinear(12, 4, exchange, "layer"), (2, 6)),
    "convolution": (lambda exchange: JoinedConv2d(6, 4, 3, 1, 1, exchange, "layer"), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("kind", JOINED)
def test_a_swap_leaves_nothing_behind(kind):
    """Not even for the garbage collector: what a node holds is as large as a batch's activations."""
    build, shape = JOINED[kind]
    layer = build(EchoExchange(0))
    gc.disable()
    try:
        y = layer(torch.randn(shape, requires_grad=True))
        y.sum().backward()
        left = weakref.ref(y.grad_fn)
        del y
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", JOINED)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_joined_layers_are_one_layer_on_both_halves(kind, dtype, tolerance, side_by_side, monkeypatch):
    """Outputs, and the gradients of inputs, weights and biases; in bfloat16 by torch.autocast."""
    if side_by_side:  # as on a GPU
        monkeypatch.setattr(joined, "_HalfByHalf", joined._SideBySide)
    build, shape = JOINED[kind]
    exchanges, kept = local_pair(), torch.float64 if dtype == torch.float64 else torch.float32
    layers = [build(exchange).to(kept) for exchange in exchanges]
    inputs = [torch.randn(shape, dtype=kept, requires_grad=True) for _ in layers]
    grad = torch.randn_like(F.conv2d(torch.cat(inputs, 1), layers[0].weight, padding=1) if kind == "convolution"
                            else torch.cat(inputs, 1) @ layers[0].weight.t())
    outputs = [None, None]

    def tower(t):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            outputs[t] = layers[t](inputs[t])
        outputs[t].backward(grad.to(dtype) * (t + 1))

    on_two_threads(tower)
    both = torch.cat(inputs, 1).detach().double().requires_grad_()
    for t, layer in enumerate(layers):
        weight, bias = (parameter.detach().double().requires_grad_() for parameter in (layer.weight, layer.bias))
        expected = F.conv2d(both, weight, bias, padding=1) if kind == "convolution" else F.linear(both, weight, bias)
        expected.backward(grad.double() * (t + 1))
        assert outputs[t].dtype == dtype
        for found, right in ((outputs[t], expected), (layer.weight.grad, weight.grad), (layer.bias.grad, bias.grad)):
            torch.testing.assert_close(found.detach().double(), right.detach(), rtol=tolerance,
                                       atol=tolerance * float(right.detach().abs().max()))
    torch.testing.assert_close(torch.cat([x.grad for x in inputs], 1).double(), both.grad, rtol=tolerance,
                               atol=tolerance * float(both.grad.abs().max()))


class Recorder(TorchDispatchMode):
    """Writes down the matrix products and convolutions of its thread, and what its exchange sends and waits for."""

    def __init__(self, exchange):
        super().__init__()
        self.events, begin, received = [], exchange.begin, exchange.received
        exchange.begin = lambda x, name: self.events.append(f"send {name}") or begin(x, name)
        exchange.received = lambda pending: self.events.append("wait") or received(pending)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__ in (
                "addmm", "mm", "_linear_pointwise", "convolution", "convolution_backward"):
            self.events.append("product")
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("kind, events", [
    ("linear", ["send layer", "wait", "product", "product", "send gradient of layer", "product", "wait"]),
    ("convolution", ["send layer", "product", "wait", "product",
                     "product", "send gradient of layer", *["product"] * 3, "wait"]),
])  # fmt: skip
def test_what_is_computed_while_messages_travel(kind, events):
    build, shape = JOINED[kind]
    exchanges, found = local_pair(), [None, None]

    def tower(t):
        layer, x = build(exchanges[t]), torch.randn(shape, requires_grad=True)
        with Recorder(exchanges[t]) as recorder:
            layer(x).sum().backward()
        found[t] = recorder.events

    on_two_threads(tower)
    assert found == [events, events]


@pytest.mark.parametrize("classes", [7, 10])
def test_shared_softmax(classes):
    """The loss is the whole network's, and each tower computes its gradient for its own logits."""
    labels = torch.tensor([0, classes - 1, 3, 4])

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *halves):
            ctx.inputs, exchanges = [x.detach().requires_grad_() for x in halves], local_pair()

            @torch.enable_grad()
            def tower(t):
                return cross_entropy(ctx.inputs[t], labels, t * ((classes + 1) // 2), exchanges[t])[0]

            ctx.losses = on_two_threads(tower)
            assert torch.equal(*ctx.losses)
            return ctx.losses[0].detach()

        @staticmethod
        def backward(ctx, grad):
            return tuple(torch.autograd.grad(loss, x, grad, retain_graph=True)[0]
                         for loss, x in zip(ctx.losses, ctx.inputs))

    halves = [half.clone().requires_grad_() for half in (torch.randn(4, classes).double() * 3).chunk(2, 1)]
    assert torch.autograd.gradcheck(Loss.apply, halves)
    torch.testing.assert_close(Loss.apply(*halves), F.cross_entropy(torch.cat(halves, 1), labels), rtol=1e-13, atol=0)


def test_shared_softmax_survives_large_logits():
    logits = torch.tensor([[1000.0, -1000.0, 0.0, 999.0]])
    labels = torch.tensor([3])
    exchanges = local_pair()
    losses = on_two_threads(lambda t: cross_entropy(logits.chunk(2, 1)[t], labels, 2 * t, exchanges[t])[0])
    assert losses[0] == losses[1] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


@pytest.mark.parametrize("classes", [3, 10, 11])
def test_ranks_and_probabilities_equal_the_whole_networks(classes):
    logits = torch.randn(50, classes, dtype=torch.float64)
    logits[:10] = logits[:10].round()  # ties
    labels = torch.randint(classes, (50,))
    exchanges = local_pair()

    def tower(t):
        scores = probabilities(logits.chunk(2, 1)[t], exchanges[t])
        return scores, rank_of_label(scores, labels, t * ((classes + 1) // 2), exchanges[t])

    (scores0, ranks0), (scores1, ranks1) = on_two_threads(tower)
    scores = torch.cat([scores0, scores1], 1)
    torch.testing.assert_close(scores, logits.softmax(1), rtol=1e-13, atol=0)
    assert torch.equal(ranks0, ranks1)
    order = scores.argsort(stable=True, dim=1, descending=True)
    assert torch.equal(ranks0, (order == labels[:, None]).int().argmax(1))
    assert torch.equal(rank_of_label(scores, labels), ranks0)


def test_towers_out_of_step_are_told():
    exchanges = local_pair(timeout_s=5)
    with pytest.raises(PeerError, match="out of step: this one is at (fc6|fc7), the other at (fc6|fc7)"):
        on_two_threads(lambda t: exchanges[t].swap(torch.zeros(1), "fc6" if t else "fc7"))


def test_silent_peer_ends_the_wait_in_time():
    exchange, _ = local_pair(timeout_s=0.2)
    began = time.perf_counter()
    with pytest.raises(PeerError, match="sent nothing for 0.2 s .waiting for conv3"):
        exchange.swap(torch.zeros(1), "conv3")
    assert time.perf_counter() - began < 2


def test_failure_wakes_a_waiter_at_once():
    inbox = Mailbox()
    threading.Timer(0.1, inbox.fail, ["the other tower died"]).start()
    began = time.perf_counter()
    with pytest.raises(PeerError, match="died"):
        inbox.take(1, "conv3", timeout_s=30)
    assert time.perf_counter() - began < 5


def test_what_arrived_before_a_failure_is_still_taken():
    inbox = Mailbox()
    inbox.put(1, "conv3", torch.ones(2))
    inbox.fail("the other tower died")
    assert torch.equal(inbox.take(1, "conv3", timeout_s=1), torch.ones(2))
