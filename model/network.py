"""The whole network as one ordinary module: the reference, and how one process trains it.

Shapes: N images, then channels x height x width. Kernels of `notes`; the two towers side by side.
"""

from __future__ import annotations

from dataclasses import astuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Dropout, LocalResponseNorm, MapNorm
from model.random import generator
from model.recipe import LAYERS, Recipe


class AlexNet(nn.Module):
    """Krizhevsky, Sutskever and Hinton (2012), figure 2. Grouped layers read their own tower only.

    `forward(images [N, 3, 224, 224], step)` -> logits [N, classes]. `step` is the number of the
    training step, from which dropout masks are drawn; in evaluation it is not used.
    """

    def __init__(self, recipe: Recipe, classes: int, seed: int = 0):
        super().__init__()
        k1, k2, k3, k4, k5 = recipe.kernels
        f6, f7 = recipe.neurons
        self.conv1 = nn.Conv2d(3, k1, 11, stride=4)
        self.conv2 = nn.Conv2d(k1, k2, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(k2, k3, 3, padding=1)
        self.conv4 = nn.Conv2d(k3, k4, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(k4, k5, 3, padding=1, groups=2)
        self.fc6 = nn.Linear(k5 * 6 * 6, f6)
        self.fc7 = nn.Linear(f6, f7)
        self.fc8 = nn.Linear(f7, classes)
        self._add_unlearned_layers(recipe, seed, tower=None)

    def _add_unlearned_layers(self, recipe: Recipe, seed: int, tower: int | None) -> None:
        self.lrn = LocalResponseNorm(recipe.lrn_k, recipe.lrn_n, recipe.lrn_alpha, recipe.lrn_beta,
                                     towers=2 if tower is None else 1)
        self.lrn_before_relu = recipe.lrn_before_relu
        self.map_norm = MapNorm(*astuple(recipe.map_norm)) if recipe.map_norm else nn.Identity()
        self.drop6 = Dropout(recipe.dropout, recipe.neurons[0], seed, "fc6", tower)
        self.drop7 = Dropout(recipe.dropout, recipe.neurons[1], seed, "fc7", tower)

    def forward(self, images: Tensor, step: int = 0) -> Tensor:
        x = F.pad(images, (0, 3, 0, 3))  # 3 x 227 x 227: the paper's 224 -> 55 is a rounding up
        x = self.conv1(x)  # 96 x 55 x 55
        x = F.relu(pool(self.lrn(x))) if self.lrn_before_relu else pool(self.lrn(F.relu(x)))  # 96 x 27 x 27
        x = pool(self.map_norm(self.lrn(F.relu(self.conv2(x)))))  # 256 x 27 x 27 -> 256 x 13 x 13
        x = F.relu(self.conv3(x))  # 384 x 13 x 13; reads both towers
        x = F.relu(self.conv4(x))  # 384 x 13 x 13
        x = pool(F.relu(self.conv5(x)))  # 256 x 13 x 13 -> 256 x 6 x 6
        x = self.drop6(F.relu(self.fc6(x.flatten(1))), step)  # 4096; reads both
        x = self.drop7(F.relu(self.fc7(x)), step)  # 4096; reads both
        return self.fc8(x)  # classes; reads both


def pool(x: Tensor) -> Tensor:
    """Overlapping max pooling (section 3.4): windows of 3, 2 apart."""
    return F.max_pool2d(x, 3, 2)


def initialise(network: nn.Module, whole_shapes: dict, recipe: Recipe, seed: int, tower: int | None = None) -> None:
    """Fill `network`, the whole or one tower of it, from (seed, parameter name) (section 5).

    The whole parameter of `whole_shapes[name]` is drawn and a tower takes its rows, so that two towers
    start as the whole network does.
    """
    for name, parameter in network.named_parameters():
        layer, kind = name.split(".")
        if kind == "bias":
            parameter.data.fill_(float(layer in recipe.ones))
            continue
        shape = whole_shapes[name]
        std = recipe.weight_std[LAYERS.index(layer)] if recipe.weight_std else (2 / shape[1:].numel()) ** 0.5
        # On the CPU in single precision whatever the network's device and type: the same start everywhere.
        weight = torch.empty(shape).normal_(0, std, generator=generator("cpu", seed, "weights", name))
        parameter.data.copy_(weight if tower is None else weight.chunk(2)[tower])
