"""What a training step is measured against: AlexNet of torch.nn's parts alone, as one would write it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.recipe import Recipe


def stock(recipe: Recipe, classes: int) -> nn.Module:
    """The whole network of a recipe of two joined towers with torch.nn's layers, nn.LocalResponseNorm among them."""
    def normalise() -> nn.Module:  # torch divides alpha by n
        return nn.LocalResponseNorm(recipe.lrn_n, recipe.lrn_n * recipe.lrn_alpha, recipe.lrn_beta, recipe.lrn_k)

    k1, k2, k3, k4, k5 = recipe.kernels
    f6, f7 = recipe.neurons
    return nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)),
        nn.Conv2d(3, k1, 11, 4), nn.ReLU(), normalise(), nn.MaxPool2d(3, 2),
        nn.Conv2d(k1, k2, 5, padding=2, groups=2), nn.ReLU(), normalise(), nn.MaxPool2d(3, 2),
        nn.Conv2d(k2, k3, 3, padding=1), nn.ReLU(),
        nn.Conv2d(k3, k4, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(k4, k5, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.Linear(36 * k5, f6), nn.ReLU(), nn.Dropout(),
        nn.Linear(f6, f7), nn.ReLU(), nn.Dropout(), nn.Linear(f7, classes))


def torchvision_shape(classes: int) -> nn.Module:
    """The layers of torchvision's `alexnet`: those of Krizhevsky (2014), narrower, not in groups, not normalised."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, padding=2), nn.ReLU(True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(6), nn.Flatten(),
        nn.Dropout(), nn.Linear(256 * 36, 4096), nn.ReLU(True),
        nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(True), nn.Linear(4096, classes))


class StockStep:
    """A training step with torch.optim.SGD; pixels [N, 3, 224, 224], labels [N]."""

    def __init__(self, network: nn.Module, recipe: Recipe, mixed: torch.dtype | None):
        self.network, self.mixed = network.train(), mixed
        self.optimizer = torch.optim.SGD(network.parameters(), recipe.learning_rate, recipe.momentum,
                                         weight_decay=recipe.weight_decay)

    def __call__(self, pixels: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(pixels.device.type, self.mixed, enabled=self.mixed is not None):
            logits = self.network(pixels)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
