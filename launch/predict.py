"""What a trained network sees in pictures of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.run_folder import Run
from launch.trained import Trained, open_trained
from launch.world import World
from model.softmax import joined, probabilities
from pipeline.files import read_plain
from pipeline.images import BrokenImage, fit

PICTURES_AT_A_TIME = 16


@dataclass(frozen=True)
class Guess:
    wnid: str
    words: str
    probability: float


def predict(
    world: World, run_path: Path, pictures: Sequence[Path], views: int, guesses: int,
    broken: Callable[[Path, str], object],
) -> Iterator[tuple[Path, list[Guess]]]:
    """Yield each picture with the classes that the run's newest checkpoint finds likeliest, the likeliest first.

    Pictures are decoded, cut and rescaled as for training; the softmax outputs of 10 views are averaged (section 4.1),
    or 1 view is the centre. Both towers yield the same. What is no picture is left out, and `broken` is told which and
    why. Raises UserError where the run cannot be used.
    """
    world.await_leader()
    trained = open_trained(world, run_path, {"pictures": list(map(str, pictures)), "views": views})
    for files, pixels in seen(trained, pictures, views, broken):
        with torch.no_grad():
            scores = probabilities(trained.network(pixels), world.exchange).unflatten(0, (len(files), -1)).mean(1)
            scores = joined(scores, len(trained.run.wnids), world.exchange)
        yield from zip(files, ranked(trained.run, scores, guesses))


def ranked(run: Run, scores: Tensor, guesses: int) -> list[list[Guess]]:
    """Return the likeliest classes of each row of scores [N, classes], the likeliest first."""
    best, labels = scores.sort(dim=1, descending=True, stable=True)
    return [[Guess(run.wnids[c], run.words[c], chance) for c, chance in zip(classes, chances)]
            for chances, classes in zip(best[:, :guesses].tolist(), labels[:, :guesses].tolist())]


def seen(
    trained: Trained, pictures: Sequence[Path], views: int, broken: Callable[[Path, str], object]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yield a few files at a time and what the network sees of them: float32 [N * views, 3, crop, crop]."""
    for batch in _fitted(pictures, broken):
        files, images = zip(*batch)
        yield list(files), trained.pixels(np.stack(images), views)


def _fitted(
    pictures: Sequence[Path], broken: Callable[[Path, str], object]
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Yield a few pictures at a time, uint8 [256, 256, 3] each."""
    batch = []
    for path in pictures:
        try:
            batch.append((path, fit(read_plain(path))))
        except BrokenImage as error:
            broken(path, str(error))
        except OSError as error:
            broken(path, error.strerror or str(error))
        if len(batch) == PICTURES_AT_A_TIME:
            yield batch
            batch = []
    if batch:
        yield batch
