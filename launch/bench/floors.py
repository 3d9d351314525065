"""What the hardware allows, measured in the same run: the rate of a large matrix product and of copying."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.precision import MIXED
from model.exchange import Exchange
from model.layers import linear
from model.network import AlexNet
from model.recipe import Recipe

CALLS_AT_ONCE = 10  # on a GPU
CALLS_OF_TWO = 200  # of two processes, which may share it by turns of a millisecond


def seconds_of(work: Callable[[], object], repeats: int, device: torch.device,
               warm_up: int = 1, exchange: Exchange | None = None) -> list[float]:
    """Time `work`, after `warm_up` calls that do not count; with an exchange both processes begin together."""
    found = []
    for _ in range(warm_up + repeats):
        if exchange is not None:
            exchange.swap(torch.zeros(1, device=device), "start of a measurement")
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found[warm_up:]


def device_seconds(work: Callable[[], object], repeats: int, device: torch.device,
                   exchange: Exchange | None = None) -> list[float]:
    """Time `work` as `seconds_of` does; on a GPU by its own clock, several calls queued at once for each repeat.

    `work` must not wait for the GPU: what it takes the host to launch it is then not measured.
    """
    if device.type == "cpu":
        return seconds_of(work, repeats, device, exchange=exchange)
    calls = CALLS_AT_ONCE if exchange is None else CALLS_OF_TWO
    found = []
    for _ in range(1 + repeats):
        if exchange is not None:
            exchange.swap(torch.zeros(1, device=device), "start of a measurement")
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(5_000_000)  # some milliseconds, in which the host gets ahead
        began.record()
        for _ in range(calls):
            work()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended) / 1e3 / calls)
    return found[1:]


def multiply_rate(precision: str, device: torch.device, exchange: Exchange | None = None) -> float:
    """Return the FLOP/s of a large square matrix product, the median of five; of the faster library on a CPU.

    With an exchange, and in `copy_seconds`, both processes measure at the same time.
    """
    size = 8192 if device.type == "cuda" else 3072
    a = torch.randn(size, size, device=device, dtype=MIXED.get(precision, torch.float32))
    with torch.no_grad():
        found = [statistics.median(device_seconds(functools.partial(product, a, a), 5, device, exchange))
                 for product in ((F.linear, linear) if device.type == "cpu" else (F.linear,))]
    return 2 * size**3 / min(found)


def copy_seconds(x: Tensor, exchange: Exchange | None = None) -> float:
    """Return how long a copy of `x` into memory in use takes, the median of nine."""
    to = torch.empty_like(x)
    return statistics.median(device_seconds(lambda: to.copy_(x), 9, x.device, exchange))


def step_work(recipe: Recipe, classes: int, number_bytes: int) -> tuple[int, int]:
    """Return the operations of a training step of the whole network and the bytes that it must move at least.

    Counted are convolutions and products, for outputs and the gradients of weights and (but of images) inputs: two
    operations a multiplication; each reads two tensors and writes one, of `number_bytes` a number. The update reads
    three numbers of 4 bytes a parameter and writes two.
    """
    operations = moved = 0

    def add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal operations, moved
        passes = 2 if layer is network.conv1 else 3
        operations += passes * 2 * output.numel() * layer.weight[0].numel()
        moved += passes * number_bytes * (inputs[0].numel() + output.numel() + layer.weight.numel())

    with torch.device("meta"), torch.no_grad():
        network = AlexNet(replace(recipe, lrn_n=0, map_norm=None, dropout=0.0), classes)
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(add)
        network(torch.empty(recipe.batch, 3, 224, 224))
    return operations, moved + 5 * 4 * sum(p.numel() for p in network.parameters())
