"""Speed of training steps on made-up images, beside torch's own network and the hardware's limits in the same run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from launch import facts
from launch.bench.floors import copy_seconds, multiply_rate, seconds_of, step_work
from launch.bench.report import beside, result, spread
from launch.bench.step_peers import StockStep, stock, torchvision_shape
from launch.precision import MIXED
from launch.world import World
from model.optimizer import optimizer_of
from model.recipe import NOTES, Recipe
from model.softmax import first_class
from model.training import TrainingStep

WARM_UP = 2  # measurements
STEPS_AT_ONCE = {"cpu": 1, "cuda": 20}  # a measurement: a GPU's queue never runs empty in training


def step_speed(world: World, recipe: Recipe, classes: int, steps: int, peers: bool = True) -> dict:
    """Train on one made-up batch, the whole network or two towers, `steps` times after two that do not count.

    On a GPU each of these is the mean of twenty. With `peers`, the same is done with torch's network as one would write
    it, and with the shape of torchvision's; with two processes with DistributedDataParallel, each on half of the batch.
    `of_arithmetic` and `of_bytes` are the shares of a step that the convolutions and products would take at the rate of
    a large matrix product, and that what they and the update move would take at the rate of a copy; with two processes
    at the rates of both at once.
    """
    world.agree({"recipe": recipe.to_dict(), "classes": classes, "steps": steps, "peers": peers,
                 "precision": world.precision, "code": facts.code_hash()})
    world.connect(recipe.towers)
    pixels, labels = made_up(recipe, classes, world.device)
    contestants: dict[str, Callable[[int], object]] = {}
    mixed = MIXED.get(world.precision)
    train_step = our_step(world, recipe, classes)
    contestants["ours"] = lambda number: train_step(pixels, labels, number)
    if peers and world.size == 1:
        others = {"stock": stock(recipe, classes)}
        if recipe.kernels == NOTES.kernels:  # of a width that can be compared
            others["torchvision_shape"] = torchvision_shape(classes)
        for name, peer in others.items():
            contestants[name] = _peer_step(StockStep(peer.to(world.device), recipe, mixed), pixels, labels)
    elif peers:
        half = slice(world.rank * recipe.batch // 2, (world.rank + 1) * recipe.batch // 2)
        ddp = DistributedDataParallel(stock(recipe, classes).to(world.device))
        contestants["ddp"] = _peer_step(StockStep(ddp, recipe, mixed), pixels[half], labels[half])
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    shares, at_once = [], STEPS_AT_ONCE[world.device.type]
    for number in range(WARM_UP + steps):
        for name, contestant in contestants.items():
            waited = world.exchange.waited_s if world.exchange else 0.0
            seconds = step_seconds(contestant, number, world.device)
            if world.exchange:  # the longer wait of the two towers counts
                mine = torch.tensor([world.exchange.waited_s - waited, seconds])
                theirs = world.exchange.swap(mine.to(world.device), "wait").cpu()
                waited_s, seconds = torch.maximum(mine, theirs).tolist()
                if name == "ours" and number >= WARM_UP:
                    shares.append(waited_s / at_once / seconds)
            if number >= WARM_UP:
                rates[name].append(recipe.batch / seconds)
    ours = rates.pop("ours")
    floors = _floors(world, recipe, classes)
    return result(
        "step", "images_per_s", ours, recipe=recipe.name, batch=recipe.batch, processes=world.size,
        threads=world.threads, device=str(world.device), precision=world.precision, **floors,
        of_arithmetic=spread([rate / recipe.batch * floors["arithmetic_s"] for rate in ours]),
        of_bytes=spread([rate / recipe.batch * floors["bytes_s"] for rate in ours]),
        **beside(ours, rates),
        **({"transport": world.transport, "waiting_for_peer": spread(shares)} if shares else {}))


def our_step(world: World, recipe: Recipe, classes: int) -> TrainingStep:
    """Return a step of the whole network, or of the tower at this end of the world's exchange."""
    network = world.build(recipe, classes, 0)
    return TrainingStep(network, optimizer_of(network, recipe), first_class(classes, world.exchange), world.exchange,
                        world.graphs)


def step_seconds(step: Callable[[int], object], number: int, device: torch.device) -> float:
    """Return the seconds a step in measurement `number`."""
    at_once = STEPS_AT_ONCE[device.type]

    def steps() -> None:
        for one in range(number * at_once, (number + 1) * at_once):
            step(one)

    return seconds_of(steps, 1, device, warm_up=0)[0] / at_once


def made_up(recipe: Recipe, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return one batch: pixels [N, 3, 224, 224] in channels_last, as the loader's, and labels [N]."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(recipe.batch, 3, 224, 224, generator=random).to(memory_format=torch.channels_last)
    return ((pixels * 64 * recipe.pixel_scale).to(device),
            torch.randint(classes, (recipe.batch,), generator=random).to(device))


def _peer_step(step: StockStep, pixels: Tensor, labels: Tensor) -> Callable[[int], None]:
    return lambda number: step(pixels, labels)


def _floors(world: World, recipe: Recipe, classes: int) -> dict[str, float]:
    number_bytes = 2 if world.precision in MIXED else 4
    sample = torch.empty(2**27 // 4, device=world.device)  # 128 MiB; a copy reads and writes it
    rates = torch.tensor([multiply_rate(world.precision, world.device, world.exchange),
                          2 * 2**27 / copy_seconds(sample, world.exchange)])
    if world.exchange:
        rates += world.exchange.swap(rates.to(world.device), "rates of both").cpu()
    flops, moved = step_work(recipe, classes, number_bytes)
    multiply, copy = rates.tolist()
    return {"multiply_flops_per_s": float(f"{multiply:.4g}"), "copied_bytes_per_s": float(f"{copy:.4g}"),
            "arithmetic_s": float(f"{flops / multiply:.4g}"), "bytes_s": float(f"{moved / copy:.4g}")}
