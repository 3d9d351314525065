"""Speed of evaluation with ten views on made-up images, beside torch's own network in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from launch import facts
from launch.bench.floors import seconds_of
from launch.bench.report import beside, result
from launch.bench.step import made_up
from launch.bench.step_peers import stock
from launch.errors import UserError
from launch.evaluate import error_rates
from launch.precision import MIXED
from launch.world import World
from model.recipe import Recipe

VIEWS = 10


def evaluate_speed(world: World, recipe: Recipe, classes: int, batch: int, repeats: int, peers: bool = True) -> dict:
    """Classify `batch` images by the mean softmax of ten views each, `repeats` times after one that does not count.

    The same batch each time; an image counts once. With two processes torch's network, the peer, runs half of the
    images in each.
    """
    if peers and batch % world.size:
        raise UserError(f"--batch {batch}: torch's network has half of the images in each process; give an even "
                        "number, or --no-peers")
    world.agree({"recipe": recipe.to_dict(), "classes": classes, "batch": batch, "repeats": repeats, "peers": peers,
                 "precision": world.precision, "code": facts.code_hash()})
    world.connect()
    pixels, _ = made_up(replace(recipe, batch=batch * VIEWS), classes, world.device)
    labels = torch.arange(batch, device=world.device) % classes
    network, mixed = world.build(recipe, classes, 0), MIXED.get(world.precision)
    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: error_rates(network, [(pixels, labels)], classes, world)}
    if peers:
        torchs = stock(recipe, classes).to(world.device).eval()
        part = pixels.chunk(world.size)[world.rank]
        contestants["stock"] = lambda: _stock_probabilities(torchs, part, mixed)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1 + repeats):
        for name, contestant in contestants.items():
            (seconds,) = seconds_of(contestant, 1, world.device, warm_up=0, exchange=world.exchange)
            if world.exchange:  # the slower of the two counts
                mine = torch.tensor([seconds], device=world.device)
                seconds = max(seconds, float(world.exchange.swap(mine, "seconds")))
            if number:
                rates[name].append(batch / seconds)
    ours = rates.pop("ours")
    return result(
        "evaluate", "images_per_s", ours, recipe=recipe.name, batch=batch, views=VIEWS, processes=world.size,
        threads=world.threads, device=str(world.device), precision=world.precision,
        **beside(ours, rates),
        **({"transport": world.transport} if world.exchange else {}))


@torch.no_grad()
def _stock_probabilities(network: nn.Module, pixels: Tensor, mixed: torch.dtype | None) -> Tensor:
    with torch.autocast(pixels.device.type, mixed, enabled=mixed is not None):
        logits = network(pixels)
    return logits.float().softmax(1).unflatten(0, (-1, VIEWS)).mean(1).argmax(1).cpu()
