"""One of the two towers: rows [t n/2, (t+1) n/2) of every parameter of the whole network.

A tower is the whole network with half of each layer's kernels. Where figure 2 joins the towers (conv3
and the fully connected layers) it computes the product with its own half of the input while the
peer's half is on its way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.convolutions import GroupedConv2d, ImageConv2d
from model.exchange import Exchange
from model.layers import Linear, linear
from model.network import IMAGE_SIDE, AlexNet, convolutions, initialise
from model.recipe import Recipe
from model.response_norm import LocalResponseNorm


class JoinedConv2d(nn.Conv2d):
    """A convolution that reads both towers: x [N, C, H, W] of the own one, weight [K, 2 C, h, w]."""

    def __init__(self, maps: int, kernels: int, size: int, stride: int, padding: int, exchange: Exchange, name: str):
        super().__init__(maps, kernels, size, stride, padding)
        self.exchange, self.name = exchange, name

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        own, peer = _columns(self.weight, self.exchange.tower)
        x, pending = self.exchange.start(x, self.name)
        y = F.conv2d(x, own, self.bias if biased else None, self.stride, self.padding)
        return y + F.conv2d(self.exchange.finish(pending), peer, None, self.stride, self.padding)


class JoinedLinear(Linear):
    """A matrix product that reads both towers: x [N, F] of the own one, weight [K, 2 F]."""

    def __init__(self, neurons: int, outputs: int, exchange: Exchange, name: str):
        super().__init__(neurons, outputs)
        self.exchange, self.name = exchange, name

    def forward(self, x: Tensor) -> Tensor:
        own, peer = _columns(self.factor, self.exchange.tower)
        x, pending = self.exchange.start(x, self.name)
        y = linear(x, own, self.bias)
        return y + linear(self.exchange.finish(pending), peer)


class JoinedResponseNorm(nn.Module):
    """Response normalisation of the own half of the maps, x [N, C, H, W], whose windows reach into the peer's half."""

    def __init__(self, norm: LocalResponseNorm, exchange: Exchange):
        super().__init__()
        self.norm, self.exchange = norm, exchange

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        reach, maps = self.norm.n // 2, x.shape[1]
        if self.exchange.tower == 0:
            inner, edge = x.split([maps - reach, reach], 1)
        else:
            edge, inner = x.split([reach, maps - reach], 1)
        edge, pending = self.exchange.start(edge, "edge of a window")
        peer = self.exchange.finish(pending)
        if self.exchange.tower == 0:
            return self.norm(torch.cat([inner, edge, peer], 1), relu)[:, :maps]
        return self.norm(torch.cat([peer, edge, inner], 1), relu)[:, reach:]


def _columns(weight: Tensor, tower: int) -> tuple[Tensor, Tensor]:
    """Views of the columns that read the own tower and of those that read the peer."""
    halves = weight.chunk(2, dim=1)
    return halves[tower], halves[1 - tower]


class Tower(AlexNet):
    """Tower `exchange.tower` of AlexNet: `forward(images, step)` -> logits [N, its half of the classes].

    Of an odd number of classes tower 0 holds one more.
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
