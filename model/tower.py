"""One of the two towers: rows [t n/2, (t+1) n/2) of every parameter of the whole network."""

from __future__ import annotations

import torch
from torch import nn

from model.convolutions import GroupedConv2d, ImageConv2d
from model.exchange import Exchange
from model.joined import JoinedConv2d, JoinedLinear, JoinedResponseNorm
from model.network import IMAGE_SIDE, AlexNet, convolutions, initialise
from model.recipe import Recipe


class Tower(AlexNet):
    """Tower `exchange.tower` of AlexNet: `forward(images, step)` -> logits [N, its half of the classes].

    The whole network with half of each layer's kernels; of an odd number of classes tower 0 holds one more.
    """

    def __init__(self, recipe: Recipe, classes: int, exchange: Exchange, seed: int = 0):
        nn.Module.__init__(self)
        tower = exchange.tower
        for conv in convolutions(recipe):
            maps = conv.maps // 2 if conv.reads == "own" else conv.maps
            shape = maps, conv.kernels // 2, conv.size, conv.stride
            if conv.reads == "image":
                layer = ImageConv2d(*shape, IMAGE_SIDE)
            elif conv.reads == "both":
                layer = JoinedConv2d(*shape, conv.padding, exchange, conv.name)
            else:
                layer = GroupedConv2d(*shape, conv.padding)
            self.add_module(conv.name, layer)
        f6, f7 = recipe.neurons
        self.fc6 = JoinedLinear(convolutions(recipe)[-1].kernels * 6 * 6, f6 // 2, exchange, "fc6")
        self.fc7 = JoinedLinear(f6, f7 // 2, exchange, "fc7")
        self.fc8 = JoinedLinear(f7, (classes + 1 - tower) // 2, exchange, "fc8")
        self._add_unlearned_layers(recipe, seed, tower)
        if recipe.lrn_across_towers and recipe.lrn_n:
            self.lrn = JoinedResponseNorm(self.lrn, exchange)


def whole_shapes(recipe: Recipe, classes: int) -> dict[str, torch.Size]:
    """Return the whole network's parameters by name. A tower's are `torch.chunk`'s half of their rows."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in AlexNet(recipe, classes).named_parameters()}


def build(recipe: Recipe, classes: int, seed: int, exchange: Exchange | None = None) -> AlexNet:
    """Return the whole network, or with an exchange the tower at this end of it, initialised, on the CPU."""
    with torch.device("meta"):  # no memory is filled twice
        network = Tower(recipe, classes, exchange, seed) if exchange else AlexNet(recipe, classes, seed)
    network = network.to_empty(device="cpu")
    initialise(network, whole_shapes(recipe, classes), recipe, seed, exchange.tower if exchange else None)
    return network
