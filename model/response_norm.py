"""Local response normalisation (section 3.3), of ReLU's output where asked, in one pass.

On the CPU, in single precision and for windows and powers like the paper's, compiled kernels do it at about the speed
of memory; anything else goes through torch's operations. Shapes: N images, C channels, H x W places.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.compiled import compiled_kernels, on_all_threads

CACHE_BLOCK_BYTES = 1 << 20


class LocalResponseNorm(nn.Module):
    """y_c = x_c / (k + alpha * sum of x_j^2 over the n maps around c)^beta (section 3.3), on [N, C, H, W].

    Channels fall into `towers` equal groups and no window crosses from one into the next. Unlike
    torch's, alpha is not divided by n: the paper's formula to the letter.
    """

    def __init__(self, k: float, n: int, alpha: float, beta: float, towers: int):
        super().__init__()
        self.k, self.n, self.alpha, self.beta, self.towers = k, n, alpha, beta, towers

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """With `relu`, the normalisation of max(x, 0). In channels_last where x is, or a kernel takes it.

        Half-precision numbers are normalised in single precision: theirs cannot tell 2 from 2.003.
        """
        if x.dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.float(), relu).to(x.dtype)
        if (x.device.type == "cpu" and x.dtype == torch.float32 and self.beta == 0.75 and self.n <= 5
                and (kernels := compiled_kernels())):
            return _CompiledResponseNorm.apply(x, kernels, self.n, self.towers, self.k, self.alpha,
                                               0.0 if relu else float("-inf"))
        x = x.relu() if relu else x
        window = _window(x.shape[1], self.n, self.towers, x.dtype, x.device)
        return _ResponseNorm.apply(x, window, self.k, self.alpha, self.beta)


@functools.lru_cache
def _window(channels: int, n: int, towers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [C, C], 1 where channel j lies in channel c's window: the sum becomes a matrix product."""
    c = torch.arange(channels, device=device)
    near = (c[:, None] - c[None, :]).abs() <= n // 2
    same_tower = c[:, None] * towers // channels == c[None, :] * towers // channels
    return (near & same_tower).to(dtype)


class _CompiledResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernels: ModuleType, n: int, towers: int, k: float, alpha: float,
                floor: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x)
        ctx.kernels, ctx.settings = kernels, (_window_factors(x.shape[1], n, towers), k, alpha, floor)
        y = torch.empty_like(x)
        on_all_threads(kernels.normalise, (_places(x), _places(y)), *ctx.settings)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad = grad.contiguous(memory_format=torch.channels_last)
        on_all_threads(ctx.kernels.normalise_backward, (_places(x), _places(grad), _places(grad_x)), *ctx.settings)
        return grad_x, None, None, None, None, None, None


@functools.cache
def _window_factors(channels: int, n: int, towers: int):
    return compiled_kernels().window_factors(channels, n, towers)


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


def _places(x: Tensor) -> Tensor:
    return _maps_last(x).flatten(0, 2)  # [N H W, C], a view of channels_last


def _power(d: Tensor, beta: float) -> Tensor:
    if beta == 0.75:  # two square roots are several times faster than a power
        root = d.rsqrt()
        return root.mul_(root.sqrt())
    return d.pow(-beta)
