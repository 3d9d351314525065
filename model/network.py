"""The whole network as one ordinary module: the reference, and how one process trains it.

Shapes: N images, then channels x height x width. Kernels of `notes`; the two towers side by side.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.convolutions import GroupedConv2d, ImageConv2d, bias_relu
from model.layers import Dropout, Linear, MapNorm
from model.random import generator
from model.recipe import CONVOLUTIONS, LAYERS, Recipe
from model.response_norm import LocalResponseNorm


IMAGE_SIDE = 227  # places with the zeros: the paper's 224 -> 55 is a rounding up


class Convolution(NamedTuple):
    """One convolution of the whole network."""

    name: str
    maps: int  # that it could read
    kernels: int
    size: int  # places, both ways, as the two below
    stride: int
    padding: int
    reads: str  # "image", "own" tower, or "both"


def convolutions(recipe: Recipe) -> list[Convolution]:
    """Return those that the recipe does not leave out, in order (figure 2)."""
    found, maps = [], 3
    geometry = ((11, 4, 0), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
    for name, kernels, (size, stride, padding) in zip(CONVOLUTIONS, recipe.kernels, geometry):
        if name not in recipe.left_out:
            reads = "image" if name == "conv1" else "both" if name in recipe.joined else "own"
            found.append(Convolution(name, maps, kernels, size, stride, padding, reads))
            maps = kernels
    return found


class AlexNet(nn.Module):
    """Krizhevsky, Sutskever and Hinton (2012), figure 2. Grouped layers read their own tower only.

    `forward(images [N, 3, 224, 224], step)` -> logits [N, classes]; the images may also be `laid_out` already. `step`
    is the number of the training step, from which dropout masks are drawn; in evaluation it is not used. With `mixed`
    set to bfloat16 or float16, convolutions and products have factors of that type (torch.autocast); weights and logits
    keep theirs.
    """

    mixed: torch.dtype | None = None

    def __init__(self, recipe: Recipe, classes: int, seed: int = 0):
        super().__init__()
        for conv in convolutions(recipe):
            if conv.reads == "image":
                layer = ImageConv2d(conv.maps, conv.kernels, conv.size, conv.stride, IMAGE_SIDE)
            else:
                layer = GroupedConv2d(conv.maps, conv.kernels, conv.size, conv.stride, conv.padding,
                                      groups=recipe.towers if conv.reads == "own" else 1)
            self.add_module(conv.name, layer)
        f6, f7 = recipe.neurons
        self.fc6 = Linear(convolutions(recipe)[-1].kernels * 6 * 6, f6)
        self.fc7 = Linear(f6, f7)
        self.fc8 = Linear(f7, classes)
        self._add_unlearned_layers(recipe, seed, tower=None)

    def _add_unlearned_layers(self, recipe: Recipe, seed: int, tower: int | None) -> None:
        groups = 1 if recipe.lrn_across_towers or tower is not None else recipe.towers
        self.lrn = (LocalResponseNorm(recipe.lrn_k, recipe.lrn_n, recipe.lrn_alpha, recipe.lrn_beta, groups)
                    if recipe.lrn_n else nn.Identity())
        self.lrn_before_relu = recipe.lrn_before_relu
        self.map_norm = MapNorm(*astuple(recipe.map_norm)) if recipe.map_norm else nn.Identity()
        self.activate = {"relu": F.relu, "tanh": torch.tanh}[recipe.activation]
        self.pool = nn.MaxPool2d(recipe.pool_size, 2)  # overlapping where 3 (section 3.4)
        self.upper = [name for name in CONVOLUTIONS[2:] if name not in recipe.left_out]
        self.drop6 = Dropout(recipe.dropout, recipe.neurons[0], seed, "fc6", tower)
        self.drop7 = Dropout(recipe.dropout, recipe.neurons[1], seed, "fc7", tower)

    def forward(self, images: Tensor, step: int = 0) -> Tensor:
        with self._autocast(images):
            logits = self.fc8(self._hidden(images, step))  # classes; reads both
        return logits.float() if self.mixed else logits

    def hidden(self, images: Tensor, step: int = 0) -> Tensor:
        """Return what fc8 reads, [N, F]: the last hidden layer's outputs, of this module's neurons."""
        with self._autocast(images):
            return self._hidden(images, step)

    def take_part(self, part: int, parts: int) -> None:
        """Be told that training's images are the part-th of so many equal parts of a step's batch."""
        for dropout in (self.drop6, self.drop7):
            dropout.part = part, parts

    def laid_out(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """Return images in the form that conv1 multiplies on a GPU; with `out`, an earlier return, written there."""
        return self.conv1.laid_out(images, self.mixed or images.dtype, out)

    def _autocast(self, images: Tensor) -> AbstractContextManager:
        return torch.autocast(images.device.type, self.mixed) if self.mixed else nullcontext()

    def _hidden(self, images: Tensor, step: int) -> Tensor:
        if self.lrn_before_relu:
            x = self.activate(self.pool(self.lrn(self.conv1(images))))  # 96 x 27 x 27
        else:
            x = self._normalised_and_pooled(self.conv1, images)
        if isinstance(self.map_norm, nn.Identity):
            x = self._normalised_and_pooled(self.conv2, x)  # 256 x 27 x 27 -> 256 x 13 x 13
        else:
            x = self.pool(self.map_norm(self._normalised(self.conv2(x))))
        for name in self.upper:  # 384 x 13 x 13, where conv3 reads both towers; again; 256 x 13 x 13
            conv = self.get_submodule(name)
            if x.is_cuda and self.activate is F.relu:
                x = bias_relu(conv(x, biased=False), conv.bias)
            else:
                x = self.activate(conv(x))
        x = self.pool(x).flatten(1)  # 256 x 6 x 6
        x = self.drop6(self.activate(self.fc6(x)), step)  # 4096; reads both
        return self.drop7(self.activate(self.fc7(x)), step)  # 4096; reads both

    def _normalised_and_pooled(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Return pool(lrn(activate(conv(x)))): where a GPU has a kernel for it, all but conv in one pass."""
        if self.activate is F.relu and isinstance(self.lrn, LocalResponseNorm) and x.is_cuda:
            return self.lrn.pooled(conv(x, biased=False), conv.bias, self.pool)
        return self.pool(self._normalised(conv(x)))

    def _normalised(self, x: Tensor) -> Tensor:
        """Return lrn(activate(x)): in one pass where that is ReLU and there is a normalisation."""
        if self.activate is F.relu and not isinstance(self.lrn, nn.Identity):
            return self.lrn(x, relu=True)
        return self.lrn(self.activate(x))


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
