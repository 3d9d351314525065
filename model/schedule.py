"""Learning rates: the paper's plateau rule, one cycle for short trainings, and changes by hand."""

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

    def rate(self, highest: float, moment: Moment) -> float:
        return highest / self.factor**moment.progress.drops

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

    def rate(self, highest: float, moment: Moment) -> float:
        step, total_steps = moment.step, moment.total_steps
        rising = max(1, round(self.warmup * total_steps))
        if step < rising:
            return highest * (step + 1) / rising
        return highest * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total_steps - rising)))

    def ended(self, progress: Progress) -> bool:
        return False

    def observe(self, progress: Progress, error: float) -> Progress:
        return Progress(min(error, progress.best_error), 0, 0)


@dataclass(frozen=True)
class ByHand:
    """Change rates after given numbers of epochs, as somebody did who watched the error.

    Defaults are those of Krizhevsky's configuration 145, whose logs match the paper's table.
    """

    drops: tuple[int, ...] = (23, 51, 78)  # epochs after which the weights' rate is divided by `factor`
    factor: float = 10.0
    conv1_slows: int = 68  # epochs after which conv1's weights have `conv1_rate`
    conv1_rate: float = 1e-5
    conv1_freezes: int = 72  # epochs after which conv1 learns nothing, biases included

    def rate(self, highest: float, moment: Moment) -> float:
        return highest / self.factor ** sum(moment.epoch >= epoch for epoch in self.drops)

    def ended(self, progress: Progress) -> bool:
        return False

    def observe(self, progress: Progress, error: float) -> Progress:
        return Progress(min(error, progress.best_error), 0, 0)


@dataclass(frozen=True)
class Moment:
    """When in a run a rate is asked for."""

    step: int
    total_steps: int
    epoch: int  # whole epochs before it
    progress: Progress


@dataclass(frozen=True)
class Progress:
    """What validation has shown so far; kept in checkpoints."""

    best_error: float = 1.0  # lowest validation error, 0-1
    stale_epochs: int = 0  # since the last improvement or drop
    drops: int = 0  # times the rate was divided

    def __post_init__(self):
        if not (0 <= self.best_error <= 1 and self.stale_epochs >= 0 and self.drops >= 0):
            raise ValueError(f"not a progress: {self}")
