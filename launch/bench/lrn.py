"""Speed of response normalisation, forward and backward, in units of copying its tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench.floors import copy_seconds, device_seconds
from launch.bench.report import result, spread
from launch.errors import UserError
from launch.precision import MIXED
from launch.world import World
from model.recipe import Recipe
from model.response_norm import LocalResponseNorm

SIDES = (55, 27)  # places of the maps of conv1 and conv2


def lrn_speed(world: World, recipe: Recipe, repeats: int, peers: bool = True) -> dict:
    """ReLU and normalisation of conv1's and conv2's outputs, in channels_last, of the whole network.

    `copies` is the time of both passes divided by that of copying the tensor; torch's, with `peers`, is nn.ReLU and
    nn.LocalResponseNorm, whose windows cross from tower to tower.
    """
    if world.size != 1:
        raise UserError("bench lrn runs in one process: start it without torchrun")
    layers, of_layer1 = {}, []
    for layer, (maps, side) in enumerate(zip(recipe.kernels, SIDES), 1):
        x = torch.randn(recipe.batch, maps, side, side, device=world.device, dtype=MIXED.get(world.precision)) * 30
        x = x.to(memory_format=torch.channels_last)
        ours = LocalResponseNorm(recipe.lrn_k, recipe.lrn_n, recipe.lrn_alpha, recipe.lrn_beta, recipe.towers)
        contestants: dict[str, Callable[[Tensor], Tensor]] = {"ours": lambda x, norm=ours: norm(x, relu=True)}
        if peers:
            torchs = nn.LocalResponseNorm(recipe.lrn_n, recipe.lrn_n * recipe.lrn_alpha, recipe.lrn_beta, recipe.lrn_k)
            contestants["torch"] = lambda x, norm=torchs: _autocast(norm, x)
        copies: dict[str, list[float]] = {name: [] for name in contestants}
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(repeats):
            copy_s = copy_seconds(x)
            for name, norm in contestants.items():
                (both,) = device_seconds(_both_passes(norm, x), 1, world.device)
                seconds[name].append(both)
                copies[name].append(both / copy_s)
        of_layer1 = of_layer1 or copies["ours"]
        layers[f"layer{layer}"] = {
            "shape": list(x.shape), "copy_s": float(f"{copy_s:.4g}"),
            **{name: {"seconds": spread(seconds[name]), "copies": spread(copies[name])} for name in contestants}}
    return result("lrn", "copies", of_layer1, recipe=recipe.name, batch=recipe.batch,
                  threads=world.threads, device=str(world.device), precision=world.precision, **layers)


def _both_passes(norm: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    x = x.detach().requires_grad_()
    grad = torch.randn_like(norm(x))
    return lambda: torch.autograd.grad(norm(x), x, grad)


def _autocast(norm: nn.LocalResponseNorm, x: Tensor) -> Tensor:
    """As in a network in half precision: on a CPU torch has it in single precision only."""
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
        return norm(F.relu(x))
