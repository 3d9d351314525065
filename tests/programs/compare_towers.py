"""Train this process's part of the network through a real transport beside the whole of it, from the same start on the
same images; where there are replicas, this one on its part of them.

Prints, as JSON, for each step the largest difference of loss, gradients and weights after it, relative to the largest
value of each tensor. In single precision every step starts from the whole network's weights: a unit within rounding of
zero, of which there is one in many a step, has another sign in the tower and other gradients from there on.
Usage: compare_towers.py RECIPE DROPOUT DTYPE CLASSES BATCH TRANSPORT DEVICE [whole]
"""

import json
import sys
from dataclasses import replace

import torch

from launch.world import join_world
from model.optimizer import optimizer_of, set_rates
from model.recipe import recipe_named
from model.schedule import Moment, Progress
from model.softmax import cross_entropy, first_class
from model.tower import build

EPOCHS = (0, 30, 40, 70, 80)  # of the steps: rates change between them


def largest_difference(part: torch.Tensor, whole: torch.Tensor) -> float:
    part, whole = part.detach(), whole.detach()
    assert torch.isfinite(part).all() and torch.isfinite(whole).all() and whole.abs().max() > 0
    return float((part - whole).abs().max() / whole.abs().max())


def main(recipe, dropout, dtype, classes, batch, transport, device, whole=None):
    recipe, dtype, classes = replace(recipe_named(recipe), dropout=float(dropout)), getattr(torch, dtype), int(classes)
    mixed, dtype = (dtype, torch.float32) if dtype == torch.bfloat16 else (None, dtype)
    torch.backends.cudnn.allow_tf32 = False
    with join_world(device, transport, timeout_s=60, threads=1, replicas=True, whole=whole is not None) as world:
        world.connect()

        def part_of(rows):
            return rows.chunk(2)[world.rank % 2] if world.towers == 2 else rows

        differences = {"loss": [], "gradient": [], "weight": []}
        whole = build(recipe, classes, 0).to(world.device, dtype)
        tower = world.build(recipe, classes, 0).to(world.device, dtype)
        whole.mixed = tower.mixed = mixed
        averaged = world.averaged(tower) or tower
        optimizers = [optimizer_of(network, recipe) for network in (whole, tower)]
        random = torch.Generator().manual_seed(5)
        parameters = sum(p.numel() for p in whole.parameters()), sum(p.numel() for p in tower.parameters())
        for step, epoch in enumerate(EPOCHS):
            images = (torch.randn(int(batch), 3, 224, 224, generator=random) * 64).to(world.device, dtype)
            images = images.to(memory_format=torch.channels_last) * recipe.pixel_scale
            labels = torch.randint(classes, (int(batch),), generator=random).to(world.device)
            for optimizer in optimizers:
                optimizer.zero_grad()
                set_rates(optimizer, recipe, Moment(step, len(EPOCHS), epoch, Progress(drops=step)))
            loss, right = cross_entropy(whole(images, step), labels)
            loss.backward()
            own = slice(*(len(images) * replica // world.replicas for replica in (world.replica, world.replica + 1)))
            tower_loss, tower_right = cross_entropy(averaged(images[own], step), labels[own],
                                                    first_class(classes, world.exchange), world.exchange)
            tower_loss.backward()
            losses, rights = zip(*world.gather([float(tower_loss.detach()), int(tower_right)])[:: world.towers])
            assert int(right) == sum(rights)
            mean = torch.tensor(sum(losses) / len(losses), dtype=torch.float64)
            differences["loss"].append(largest_difference(mean, loss.cpu()))
            pairs = list(zip(tower.parameters(), whole.parameters()))
            differences["gradient"].append(max(largest_difference(part.grad, part_of(all_rows.grad))
                                               for part, all_rows in pairs))
            for optimizer in optimizers:
                optimizer.step()
            differences["weight"].append(max(largest_difference(part, part_of(all_rows))
                                             for part, all_rows in pairs))
            if dtype == torch.float32:
                for part, all_rows in pairs:
                    all_velocity, velocity = (optimizer.state[p]["velocity"]
                                              for optimizer, p in zip(optimizers, (all_rows, part)))
                    part.data.copy_(part_of(all_rows.data))
                    velocity.copy_(part_of(all_velocity))
    sys.stdout.write(json.dumps({"rank": world.rank, "parameters": parameters, **differences}) + "\n")


main(*sys.argv[1:])
