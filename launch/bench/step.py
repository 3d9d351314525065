"""Speed of training steps."""

from __future__ import annotations

import time

import torch

from launch import facts
from launch.bench.report import result, spread
from launch.precision import MIXED
from launch.world import World
from model.optimizer import optimizer_of
from model.recipe import Recipe
from model.tower import build
from model.training import TrainingStep


def step_speed(world: World, recipe: Recipe, classes: int, steps: int) -> dict:
    """Train on one made-up batch, whole network or two towers, and say how long the peer was waited for."""
    world.agree({"recipe": recipe.to_dict(), "classes": classes, "steps": steps, "code": facts.code_hash(),
                 "precision": world.precision})
    world.connect()
    network = build(recipe, classes, 0, world.exchange).to(world.device)
    network.mixed = MIXED.get(world.precision)
    train_step = TrainingStep(network, optimizer_of(network, recipe), world.first_class(classes), world.exchange)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(recipe.batch, 3, 224, 224, generator=random).to(memory_format=torch.channels_last)
    pixels = pixels.to(world.device) * 64 * recipe.pixel_scale
    labels = torch.randint(classes, (recipe.batch,), generator=random).to(world.device)
    rates, shares = [], []
    for step in range(2 + steps):
        began, waited = time.perf_counter(), world.exchange.waited_s if world.exchange else 0.0
        train_step(pixels, labels, step)
        if pixels.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rates.append(recipe.batch / seconds)
        if world.exchange:  # the longer wait of the two towers counts
            mine = torch.tensor([world.exchange.waited_s - waited])
            theirs = world.exchange.swap(mine.to(world.device), "wait").cpu()
            shares.append(float(torch.maximum(mine, theirs)) / seconds)
    return result("step", "images_per_s", rates[2:], recipe=recipe.name, batch=recipe.batch, processes=world.size,
                   threads=world.threads, device=str(world.device), precision=world.precision,
                   **({"transport": world.transport, "waiting_for_peer": spread(shares[2:])} if shares else {}))
