"""Speed of the exchange alone: what two towers swap in a training step, one message after the other."""

from __future__ import annotations

import torch

from launch import facts
from launch.bench.floors import copy_seconds, seconds_of
from launch.bench.report import result, spread
from launch.errors import UserError
from launch.precision import MIXED
from launch.world import World
from model.recipe import Recipe


def exchange_speed(world: World, recipe: Recipe, repeats: int) -> dict:
    """Swap the activations that conv3 and the fully connected layers read, each by itself, with nothing to hide behind.

    `of_copy` is the time of copying as many bytes as one process receives, divided by the time of the swap: 1 is as
    fast as memory. On a GPU the copy is timed by its own clock, the swap by the host's, with all that launching takes.
    Every one is swapped twice in a step, the second time as its gradient.
    """
    if world.size != 2:
        raise UserError("bench exchange needs two processes: python -m launch.torchrun --standalone "
                        "--nproc-per-node 2 -m launch.cli bench exchange")
    world.agree({"recipe": recipe.to_dict(), "repeats": repeats, "precision": world.precision,
                 "code": facts.code_hash()})
    world.connect()
    totals, messages = [0.0] * repeats, {}
    for name, shape in activations(recipe).items():
        x = torch.randn(shape, device=world.device, dtype=MIXED.get(world.precision))
        if x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        copy_s = copy_seconds(x, world.exchange)
        seconds = seconds_of(lambda x=x, name=name: world.exchange.swap(x, name), repeats, world.device,
                             exchange=world.exchange)
        totals = [total + 2 * s for total, s in zip(totals, seconds)]
        messages[name] = {"mib": round(x.numel() * x.element_size() / 2**20, 2), "seconds": spread(seconds),
                          "of_copy": spread([copy_s / s for s in seconds])}
    return result("exchange", "seconds_a_step", totals, recipe=recipe.name, batch=recipe.batch, processes=2,
                  threads=world.threads, device=str(world.device), precision=world.precision,
                  transport=world.transport, messages=messages)


def activations(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a tower sends forward, by the layer that reads it. (In `notes`, `paper` and `tiny`.)"""
    n, kernels, neurons = recipe.batch, recipe.kernels, recipe.neurons
    return {"conv3": (n, kernels[1] // 2, 13, 13), "fc6": (n, kernels[4] // 2 * 36), "fc7": (n, neurons[0] // 2),
            "fc8": (n, neurons[1] // 2)}
