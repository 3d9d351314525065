"""What happened in the steps between two lines of a run's log."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from launch.facts import memory_gib
from launch.world import World
from pipeline.loader import TrainingLoader


class Interval:
    """Sums over steps. Its clock starts when it is made."""

    def __init__(self, loader: TrainingLoader, world: World):
        self._loader, self._world = loader, world
        self.steps, self._images, self._loss, self._right = 0, 0, torch.zeros(()), 0
        self._began, self._waits_before = time.perf_counter(), self._waits()

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        """Add a step, in which this process had so many images."""
        self.steps += 1
        self._images += images
        self._loss = self._loss + loss  # tensors: on a GPU nothing waits for them here
        self._right = self._right + right

    def told(self) -> list[float]:
        """Return what the processes tell each other of theirs: mean loss, right images, seconds waited for the peer,
        GiB of memory."""
        return [float(self._loss) / self.steps, int(self._right), self._waits()[1] - self._waits_before[1],
                memory_gib(self._world.device)]

    def figures(self, told: list[list[float]]) -> dict:
        """Return the log's figures, of what each process has `told`: means over the images of all replicas, shares
        (0-1) of the time. Sets `seconds`.

        Of the towers' waits for each other it is the longest that counts, of memory the most that a process has.
        """
        replicas = told[:: self._world.towers]
        images = self._images * len(replicas)
        self.seconds = time.perf_counter() - self._began
        return {"loss": sum(loss for loss, *_ in replicas) / len(replicas),
                "train_top1_error": 1 - sum(right for _, right, *_ in replicas) / images,
                "images_per_s": images / self.seconds,
                "waiting_for_data": (self._waits()[0] - self._waits_before[0]) / self.seconds,
                "waiting_for_peer": max(waited for _, _, waited, _ in told) / self.seconds,
                "memory_gib": round(max(memory for *_, memory in told), 3)}

    def _waits(self) -> tuple[float, float]:
        return self._loader.wait_s, self._world.exchange.waited_s if self._world.exchange else 0.0
