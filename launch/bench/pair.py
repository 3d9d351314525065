"""Two towers on two devices of their own, modelled from parts that one device can measure."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from launch.bench.exchange import activations
from launch.bench.report import result, spread
from launch.bench.step import WARM_UP, made_up, our_step, step_seconds
from launch.errors import UserError
from launch.precision import MIXED
from launch.world import World
from model.exchange.local import EchoExchange
from model.recipe import Recipe


def pair_model(world: World, recipe: Recipe, classes: int, repeats: int, link_bytes_per_s: float,
               latency_s: float) -> dict:
    """Model the speed of two towers on two devices, divided by that of the whole network on one.

    Measured in turn: steps of the whole network, and of one tower whose peer answers each swap after `latency_s` and
    the time of its bytes over a link of `link_bytes_per_s` each way; what the tower computes meanwhile hides it.
    Supposed: that the peer is always as far as the tower, and that sending takes nothing from arithmetic.
    """
    if world.size != 1:
        raise UserError("bench pair runs in one process: start it without torchrun")
    sent = 2 * sum(map(prod, activations(recipe).values())) * (2 if world.precision in MIXED else 4)
    pixels, labels = made_up(recipe, classes, world.device)
    recipe = replace(recipe, learning_rate=1e-9)  # what the echo teaches is wrong: the weights are to stay as they are
    tower = replace(world, exchange=EchoExchange(0, latency_s, link_bytes_per_s))
    steps = {"whole": our_step(world, recipe, classes), "tower": our_step(tower, recipe, classes)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + repeats):
        for name, step in steps.items():
            took = step_seconds(lambda one, step=step: step(pixels, labels, one), number, world.device)
            if number >= WARM_UP:
                seconds[name].append(took)
    return result(
        "pair", "speed_up", [whole / tower for whole, tower in zip(*seconds.values())],
        whole=spread([recipe.batch / s for s in seconds["whole"]]),
        tower=spread([recipe.batch / s for s in seconds["tower"]]), sent_bytes=sent, link_bytes_per_s=link_bytes_per_s,
        latency_s=latency_s, recipe=recipe.name, batch=recipe.batch, threads=world.threads, device=str(world.device),
        precision=world.precision)
