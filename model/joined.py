"""Layers that read both towers: conv3 and the fully connected ones (figure 2).

Each swaps inputs with its twin in the other tower and computes with both halves side by side, as the whole network
does; a convolution on a CPU, which takes far longer than its input's way, begins with the own half meanwhile.
Backward, the gradient of the peer's half is computed first and sent; while it and the one in return are on their way,
the weight's gradient is computed.

Shapes: N images, C channels of one tower, H x W places, F neurons of one tower, K outputs of this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.exchange import Exchange
from model.layers import Linear, product
from model.response_norm import LocalResponseNorm


class JoinedConv2d(nn.Conv2d):
    """A convolution that reads both towers: x [N, C, H, W] of the own one, weight [K, 2 C, h, w]."""

    def __init__(self, maps: int, kernels: int, size: int, stride: int, padding: int, exchange: Exchange, name: str):
        super().__init__(maps, kernels, size, stride, padding)
        self.exchange, self.name = exchange, name

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        way = _HalfByHalf if x.device.type == "cpu" else _SideBySide
        return _joined(way, self, x, self.weight, self.bias if biased else None)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return [N, K, H', W'] for x and weight of both towers, or of one; without autograd, as the gradients."""
        return F.conv2d(x, weight, bias, self.stride, self.padding)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return that of x, from grad [N, K, H', W']."""
        return self._gradients(grad, x, weight, [True, False, False])[0]

    def weight_gradients(self, grad: Tensor, x: Tensor, weight: Tensor, biased: bool) -> tuple[Tensor, Tensor | None]:
        """Return those of the weight and, where there is one, of the bias [K]."""
        return self._gradients(grad, x, weight, [False, True, biased])[1:]

    def _gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)], self.stride, self.padding, self.dilation, False, [0, 0], 1, wanted)


class JoinedLinear(Linear):
    """A matrix product that reads both towers: x [N, F] of the own one, weight [K, 2 F]."""

    def __init__(self, neurons: int, outputs: int, exchange: Exchange, name: str):
        super().__init__(neurons, outputs)
        self.exchange, self.name = exchange, name

    def forward(self, x: Tensor) -> Tensor:
        return _joined(_SideBySide, self, x, self.factor, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return [N, K] for x [N, 2 F]; without autograd, as the gradients."""
        return product(x, weight, bias)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return that of x, from grad [N, K]."""
        return product(grad.contiguous(), weight.t())

    def weight_gradients(self, grad: Tensor, x: Tensor, weight: Tensor, biased: bool) -> tuple[Tensor, Tensor | None]:
        """Return those of the weight and, where there is one, of the bias [K]."""
        return product(grad.contiguous().t(), x.t()), grad.sum(0) if biased else None


def _joined(way: type[_SideBySide | _HalfByHalf], layer: JoinedConv2d | JoinedLinear, x: Tensor, weight: Tensor,
            bias: Tensor | None) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # which does not reach the backward pass: it is given what forward multiplied
        x, weight, bias = (t if t is None else t.to(torch.get_autocast_dtype(kind)) for t in (x, weight, bias))
    return way.apply(x, weight, bias, layer)


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: JoinedConv2d | JoinedLinear) -> Tensor:
        both = _in_order(layer, x, layer.exchange.swap(x, layer.name))
        ctx.save_for_backward(both, weight)
        ctx.layer, ctx.biased = layer, bias is not None
        return layer.product(both, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (both, weight), layer = ctx.saved_tensors, ctx.layer
        of_own, of_peer = _halves(layer, layer.input_gradient(grad, both, weight))
        pending = layer.exchange.start(of_peer, f"gradient of {layer.name}")
        of_weight, of_bias = layer.weight_gradients(grad, both, weight, ctx.biased)
        return of_own + layer.exchange.finish(pending), of_weight, of_bias, None


class _HalfByHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: JoinedConv2d) -> Tensor:
        pending = layer.exchange.start(x, layer.name)
        for_own, for_peer = _halves(layer, weight)
        y = layer.product(x, for_own, bias)
        peer = layer.exchange.finish(pending)
        ctx.save_for_backward(x, peer, weight)
        ctx.layer, ctx.biased = layer, bias is not None
        return y.add_(layer.product(peer, for_peer, None))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x, peer, weight), layer = ctx.saved_tensors, ctx.layer
        for_own, for_peer = _halves(layer, weight)
        pending = layer.exchange.start(layer.input_gradient(grad, peer, for_peer), f"gradient of {layer.name}")
        of_peer, _ = layer.weight_gradients(grad, peer, for_peer, False)
        of_own, of_bias = layer.weight_gradients(grad, x, for_own, ctx.biased)
        grad_x = layer.input_gradient(grad, x, for_own)
        return grad_x.add_(layer.exchange.finish(pending)), _in_order(layer, of_own, of_peer), of_bias, None


def _in_order(layer: JoinedConv2d | JoinedLinear, own: Tensor, peer: Tensor) -> Tensor:
    """Return the halves of tower 0 and tower 1 side by side."""
    return torch.cat([peer, own] if layer.exchange.tower else [own, peer], 1)


def _halves(layer: JoinedConv2d | JoinedLinear, both: Tensor) -> tuple[Tensor, Tensor]:
    """Return the own half and the peer's, views."""
    halves = both.chunk(2, 1)
    return halves[layer.exchange.tower], halves[1 - layer.exchange.tower]


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
        edge, peer = _Swap.apply(edge, self.exchange, "edge of a window")
        if self.exchange.tower == 0:
            return self.norm(torch.cat([inner, edge, peer], 1), relu)[:, :maps]
        return self.norm(torch.cat([peer, edge, inner], 1), relu)[:, reach:]


class _Swap(torch.autograd.Function):
    """x -> x and the peer's x. The gradient of what came from the peer is the peer's to add."""

    @staticmethod
    def forward(ctx, x: Tensor, exchange: Exchange, name: str) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.name = exchange, name
        return x.view_as(x), exchange.swap(x, name)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_peer: Tensor):
        return grad + ctx.exchange.swap(grad_peer, f"gradient of {ctx.name}"), None, None
