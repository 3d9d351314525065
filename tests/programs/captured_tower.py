"""Train one tower through a real transport, replayed from CUDA graphs and not, from the same start on the same images.

Prints, as JSON, the losses of both and the smallest cosine between the ways that a parameter went.
Usage: captured_tower.py PRECISION TRANSPORT
"""

import json
import sys
from dataclasses import replace

import torch

from launch.precision import MIXED
from launch.world import join_world
from model.optimizer import optimizer_of
from model.recipe import NOTES
from model.softmax import first_class
from model.tower import build
from model.training import TrainingStep


def trained(world, captured):
    recipe = replace(NOTES, learning_rate=0.001)
    network = build(recipe, 10, 3, world.exchange)
    network.mixed = MIXED.get(world.precision)
    network = network.to(world.device)
    start = [p.detach().clone() for p in network.parameters()]
    first = first_class(10, world.exchange)
    step = TrainingStep(network, optimizer_of(network, recipe), first, world.exchange, captured)
    random, losses = torch.Generator().manual_seed(0), []
    for number in range(10):
        pixels = (torch.randn(16, 3, 224, 224, generator=random) * 30).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (16,), generator=random)
        losses.append(float(step(pixels.to(world.device), labels.to(world.device), number)[0]))
    return losses, [(p.detach() - before).flatten() for p, before in zip(network.parameters(), start)]


def main(precision, transport):
    with join_world("cuda", transport, timeout_s=60, threads=1, precision=precision) as world:
        world.connect()
        (losses, moved), (expected, others) = trained(world, True), trained(world, False)
        cosine = min(float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in zip(moved, others))
    sys.stdout.write(json.dumps({"rank": world.rank, "losses": losses, "expected": expected, "cosine": cosine}) + "\n")


main(*sys.argv[1:])
