"""What the hardware allows, measured in the same run: the rate of a large matrix product and of copying."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from launch.precision import MIXED
from model.network import AlexNet
from model.recipe import Recipe


def seconds_of(work: Callable[[], object], repeats: int, device: torch.device,
               warm_up: int = 1) -> list[float]:
    """Time `work`, after `warm_up` calls that do not count."""
    found = []
    for _ in range(warm_up + repeats):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found[warm_up:]


def multiply_rate(precision: str, device: torch.device) -> float:
    """Return the FLOP/s of a large square matrix product, the median of five."""
    size = 8192 if device.type == "cuda" else 3072
    a = torch.randn(size, size, device=device, dtype=MIXED.get(precision, torch.float32))
    out = torch.empty_like(a)
    return 2 * size**3 / statistics.median(seconds_of(lambda: torch.mm(a, a, out=out), 5, device))


def copy_seconds(x: Tensor) -> float:
    """Return how long a copy of `x` into memory in use takes, the median of nine."""
    to = torch.empty_like(x)
    return statistics.median(seconds_of(lambda: to.copy_(x), 9, x.device))


def step_flops(recipe: Recipe, classes: int) -> int:
    """Return the operations of convolutions and products in a training step of the whole network, additions too."""
    with torch.device("meta"):
        network = AlexNet(replace(recipe, lrn_n=0, map_norm=None, dropout=0.0), classes)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(recipe.batch, 3, 224, 224)).sum().backward()
    return counter.get_total_flops()


def step_bytes(recipe: Recipe, classes: int, number_bytes: int) -> int:
    """Return the bytes that a training step must move if only convolutions, products and the update touch memory.

    Each of the three products of a layer (outputs, gradients of inputs and of weights) reads two tensors and writes
    one, of `number_bytes` a number; the update reads three and writes two of each parameter, 4 bytes a number.
    """
    moved = 0

    def add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal moved
        moved += 3 * number_bytes * (inputs[0].numel() + output.numel() + layer.weight.numel())

    with torch.device("meta"):
        network = AlexNet(replace(recipe, lrn_n=0, map_norm=None, dropout=0.0), classes)
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(add)
        network(torch.empty(recipe.batch, 3, 224, 224))
    return moved + 5 * 4 * sum(p.numel() for p in network.parameters())
