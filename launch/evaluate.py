"""Top-1 and top-5 error over a split, every image counted exactly once."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.runlog import RunLog
from launch.trained import open_trained
from launch.world import World
from model.network import AlexNet
from model.softmax import first_class, probabilities, rank_of_label
from pipeline.manifest import check_files, load_manifest
from pipeline.shards import ShardImages


@dataclass(frozen=True)
class Errors:
    """Shares of images, 0-1."""

    top1: float
    top5: float
    images: int


@torch.no_grad()
def error_rates(network: AlexNet, batches: Iterable[tuple[Tensor, Tensor]], classes: int, world: World) -> Errors:
    """Evaluate `network`, the whole one or this process's tower: all processes return the same.

    `batches` yields pixels [N * V, 3, 224, 224], an image's V views together, and labels [N], to each replica other
    ones. The softmax outputs of an image's views are averaged (section 4.1).
    """
    network.eval()
    first = first_class(classes, world.exchange)
    wrong1 = wrong5 = images = 0
    for pixels, labels in batches:
        scores = probabilities(network(pixels), world.exchange).unflatten(0, (len(labels), -1)).mean(1)
        ranks = rank_of_label(scores, labels, first, world.exchange)
        wrong1 += int((ranks >= 1).sum())
        wrong5 += int((ranks >= 5).sum())
        images += len(labels)
    counts = world.gather([wrong1, wrong5, images])[:: world.towers]
    wrong1, wrong5, images = (int(sum(column)) for column in zip(*counts))
    return Errors(wrong1 / images, wrong5 / images, images)


def evaluate_run(
    world: World, run_path: Path, shards: Path, split: str, views: int, batch: int, best: bool = False
) -> tuple[Errors, int]:
    """Evaluate a run's newest checkpoint, or the best, over a split, with 1 or 10 views; return its errors and step.

    The run's log keeps them too, where it can be written.
    """
    world.await_leader()
    manifest, data = load_manifest(shards)
    images = ShardImages(shards, manifest, split)
    if world.leads:
        check_files(shards, manifest.splits[split].files)
    trained = open_trained(world, run_path, {"split": split, "views": views, "batch": batch}, (shards, manifest, data),
                           best)
    found = error_rates(trained.network, trained.batches(images, views, batch), len(trained.run.wnids), world)
    if world.leads:
        with suppress(OSError), RunLog(trained.folder.log_path) as log:
            log.write("evaluation", step=trained.step, split=split, views=views, data=data, images=found.images,
                      precision=world.precision, top1_error=found.top1, top5_error=found.top5)
    return found, trained.step
