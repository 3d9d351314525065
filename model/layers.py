"""What AlexNet has and torch.nn has not quite: its response normalisation and its dropout.

Shapes: N images, C channels, H x W places, F neurons.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.random import generator

CACHE_BLOCK_BYTES = 1 << 20


class LocalResponseNorm(nn.Module):
    """y_c = x_c / (k + alpha * sum of x_j^2 over the n maps around c)^beta (section 3.3), on [N, C, H, W].

    Channels fall into `towers` equal groups and no window crosses from one into the next. Unlike
    torch's, alpha is not divided by n: the paper's formula to the letter.
    """

    def __init__(self, k: float, n: int, alpha: float, beta: float, towers: int):
        super().__init__()
        self.k, self.n, self.alpha, self.beta, self.towers = k, n, alpha, beta, towers

    def forward(self, x: Tensor) -> Tensor:
        window = _window(x.shape[1], self.n, self.towers, x.dtype, x.device)
        return _ResponseNorm.apply(x, window, self.k, self.alpha, self.beta)


@functools.lru_cache
def _window(channels: int, n: int, towers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [C, C], 1 where channel j lies in channel c's window: the sum becomes a matrix product."""
    c = torch.arange(channels, device=device)
    near = (c[:, None] - c[None, :]).abs() <= n // 2
    same_tower = c[:, None] * towers // channels == c[None, :] * towers // channels
    return (near & same_tower).to(dtype)


class _ResponseNorm(torch.autograd.Function):
    """Works through the batch in blocks, whose intermediate values stay in a core's cache on the CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, window: Tensor, k: float, alpha: float, beta: float) -> Tensor:
        ctx.alpha, ctx.beta = alpha, beta
        y, base = torch.empty_like(x), torch.empty_like(x)
        for part in _blocks(x):
            a, d = _maps_last(x[part]), _maps_last(base[part])
            d.copy_(torch.matmul(a * a, window).mul_(alpha).add_(k))
            torch.mul(a, _power(d, beta), out=_maps_last(y[part]))
        ctx.save_for_backward(x, base, window)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        # dL/dx_c = g_c d_c^-beta - 2 alpha beta x_c * sum over the window of g_j x_j d_j^(-beta - 1)
        x, base, window = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        for part in _blocks(x):
            a, d, g = _maps_last(x[part]), _maps_last(base[part]), _maps_last(grad[part])
            direct = _power(d, ctx.beta).mul_(g)
            through = torch.matmul((direct * a).div_(d), window).mul_(a)
            torch.add(direct, through, alpha=-2 * ctx.alpha * ctx.beta, out=_maps_last(grad_x[part]))
        return grad_x, None, None, None, None


def _blocks(x: Tensor) -> list[slice]:
    images = len(x)
    if x.device.type == "cpu" and images:
        images = max(1, CACHE_BLOCK_BYTES // (x[0].numel() * x.element_size()))
    return [slice(first, first + images) for first in range(0, len(x), max(1, images))]


def _maps_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)  # [N, H, W, C]: contiguous where x is channels_last


def _power(d: Tensor, beta: float) -> Tensor:
    if beta == 0.75:  # two square roots are several times faster than a power
        root = d.rsqrt()
        return root.mul_(root.sqrt())
    return d.pow(-beta)


class MapNorm(nn.Module):
    """y = x / (k + alpha * sum of x^2 over the n x n places around it, in the same map)^beta, on [N, C, H, W].

    Of Krizhevsky's own configuration, not of the paper. Places beyond the edge count as zeros.
    """

    def __init__(self, k: float, n: int, alpha: float, beta: float):
        super().__init__()
        self.k, self.n, self.alpha, self.beta = k, n, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(x * x, self.n, stride=1, padding=self.n // 2)  # of n x n places, those beyond the edge too
        return x * (self.k + self.alpha * self.n**2 * mean).pow(-self.beta)


class Dropout(nn.Module):
    """Section 4.2: in training each output is kept with chance 1 - p; at test all are times 1 - p.

    The mask is drawn for both towers' neurons from (seed, layer, step) and each tower takes its
    part, so that two towers drop what the whole network drops, and a resumed run what it would have.
    """

    def __init__(self, p: float, neurons: int, seed: int, layer: str, tower: int | None):
        super().__init__()
        self.p, self.neurons, self.seed, self.layer, self.tower = p, neurons, seed, layer, tower

    def forward(self, x: Tensor, step: int) -> Tensor:
        """x [N, F] -> [N, F]; F is `neurons`, or the tower's half of them."""
        if self.p == 0:
            return x
        if not self.training:
            return x * (1 - self.p)
        random = generator(x.device, self.seed, "dropout", self.layer, step)
        kept = torch.empty(len(x), self.neurons, device=x.device).bernoulli_(1 - self.p, generator=random)
        if self.tower is not None:
            kept = kept.chunk(2, dim=1)[self.tower]
        return x * kept.to(x.dtype)
