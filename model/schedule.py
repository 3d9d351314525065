"""Learning rates: the paper's plateau rule, and one cycle for short trainings."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Plateau:
    """Divide the rate when the validation error stops improving (section 5), a few times; then end.

    "Stops improving" is made exact: no new lowest error in `patience_epochs` epochs in a row.
    """

    factor: float = 10.0
    drops: int = 3
    patience_epochs: int = 5

    def rate(self, highest: float, step: int, total_steps: int, progress: Progress) -> float:
        return highest / self.factor**progress.drops

    def ended(self, progress: Progress) -> bool:
        return progress.drops > self.drops

    def observe(self, progress: Progress, error: float) -> Progress:
        if error < progress.best_error:
            return Progress(error, 0, progress.drops)
        if progress.stale_epochs + 1 < self.patience_epochs:
            return Progress(progress.best_error, progress.stale_epochs + 1, progress.drops)
        return Progress(progress.best_error, 0, progress.drops + 1)


@dataclass(frozen=True)
class OneCycle:
    """Rise linearly to the highest rate, then fall to 0 along half a cosine (after Smith 2018)."""

    warmup: float = 0.15  # share of all steps spent rising

    def rate(self, highest: float, step: int, total_steps: int, progress: Progress) -> float:
        rising = max(1, round(self.warmup * total_steps))
        if step < rising:
            return highest * (step + 1) / rising
        return highest * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total_steps - rising)))

    def ended(self, progress: Progress) -> bool:
        return False

    def observe(self, progress: Progress, error: float) -> Progress:
        return Progress(min(error, progress.best_error), 0, 0)


@dataclass(frozen=True)
class Progress:
    """What validation has shown so far; kept in checkpoints."""

    best_error: float = 1.0  # lowest validation error, 0-1
    stale_epochs: int = 0  # since the last improvement or drop
    drops: int = 0  # times the rate was divided

    def __post_init__(self):
        if not (0 <= self.best_error <= 1 and self.stale_epochs >= 0 and self.drops >= 0):
            raise ValueError(f"not a progress: {self}")
