"""Local response normalisation (section 3.3), of ReLU's output where asked, in one pass.

Kernels do it for windows like the paper's: on the CPU for float32 and bfloat16 (Numba), on a GPU for float16 too and
with the pooling that follows (Triton). Anything else goes through torch's operations.

Shapes: N images, C channels, H x W places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.compiled import compiled_kernels, gpu_kernels, gpu_kernels_for, on_all_threads

CACHE_BLOCK_BYTES = 1 << 20


class LocalResponseNorm(nn.Module):
    """y_c = x_c / (k + alpha * sum of x_j^2 over the n maps around c)^beta (section 3.3), on [N, C, H, W].

    Channels fall into `towers` equal groups and no window crosses from one into the next. Unlike
    torch's, alpha is not divided by n: the paper's formula to the letter. ValueError for an even n, and for channels
    that do not fall into `towers` groups.
    """

    def __init__(self, k: float, n: int, alpha: float, beta: float, towers: int):
        super().__init__()
        if n < 1 or n % 2 == 0 or towers < 1:
            raise ValueError(f"windows of {n} maps, {towers} groups: n is odd, and there is a group at least")
        self.k, self.n, self.alpha, self.beta, self.towers = k, n, alpha, beta, towers

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """With `relu`, the normalisation of max(x, 0). In channels_last where x is, or a kernel takes it.

        Arithmetic on half-precision numbers is in single precision: theirs cannot tell 2 from 2.003.
        """
        if x.shape[1] % self.towers:
            raise ValueError(f"{x.shape[1]} channels do not fall into {self.towers} equal groups")
        if not x.numel():
            return x
        if (kernel := self._kernel_for(x, relu)) is not None:
            return _FusedResponseNorm.apply(x, kernel)
        if x.dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.float(), relu).to(x.dtype)
        x = x.relu() if relu else x
        window = _window(x.shape[1], self.n, self.towers, x.dtype, x.device)
        return _ResponseNorm.apply(x, window, self.k, self.alpha, self.beta)

    def pooled(self, x: Tensor, bias: Tensor, pool: nn.MaxPool2d) -> Tensor:
        """Return pool(self(x + bias, relu=True)), bias [C]: where a GPU has a kernel for it in one pass."""
        if x.is_cuda and (pool.kernel_size, pool.stride) == (3, 2) and (kernel := self._kernel_for(x, relu=True)):
            return _PooledResponseNorm.apply(x, bias, kernel)
        return pool(self(x + bias[:, None, None].to(x.dtype), relu=True))

    def _kernel_for(self, x: Tensor, relu: bool) -> Kernel | None:
        if self.n > 5 or x.shape[1] % self.towers:
            return None
        if gpu := gpu_kernels_for(x):
            return gpu_kernel(gpu, self, relu)
        on_cpu = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
        if on_cpu and self.beta == 0.75 and (cpu := compiled_kernels()):
            return _cpu_kernel(cpu, self, x, relu)
        return None


# Called with ("normalise", x, y) or ("normalise_backward", x, grad, grad_x), channels_last, writes the last; a GPU's
# also with the pooled pair of model.gpu_kernels.
Kernel = Callable[..., None]


def _cpu_kernel(kernels: ModuleType, norm: LocalResponseNorm, x: Tensor, relu: bool) -> Kernel:
    near = _window_factors(x.shape[1], norm.n, norm.towers, x.element_size())
    floor = 0.0 if relu else float("-inf")

    def run(name: str, *tensors: Tensor) -> None:
        places = tuple(_maps_last(tensor).flatten(0, 2) for tensor in tensors)  # [N H W, C], views
        on_all_threads(getattr(kernels, name), places, near, norm.k, norm.alpha, floor)

    return run


def gpu_kernel(kernels: ModuleType, norm: LocalResponseNorm, relu: bool) -> Kernel:
    """Return the kernels of model.gpu_kernels for `norm`."""
    def run(name: str, *tensors: Tensor, bias: Tensor | None = None) -> None:
        getattr(kernels, name)(*tensors, bias, norm.n, norm.towers, norm.k, norm.alpha, norm.beta, relu)

    return run


class _FusedResponseNorm(torch.autograd.Function):
    """Keeps x for backward, and nothing else."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Kernel) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x)
        ctx.kernel = kernel
        y = torch.empty_like(x)
        kernel("normalise", x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        ctx.kernel("normalise_backward", x, grad.contiguous(memory_format=torch.channels_last), grad_x)
        return grad_x, None


class _PooledResponseNorm(torch.autograd.Function):
    """Keeps x, and of each maximum a byte: its place in the window."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor, kernel: Kernel) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        sides = [(side - 3) // 2 + 1 for side in x.shape[2:]]
        y = torch.empty(*x.shape[:2], *sides, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        where = torch.empty_like(y, dtype=torch.uint8)
        kernel("normalise_and_pool", x, y, where, bias=bias)
        ctx.save_for_backward(x, bias, where)
        ctx.kernel = kernel
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, bias, where = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad = grad.contiguous(memory_format=torch.channels_last)
        ctx.kernel("normalise_and_pool_backward", x, grad, where, grad_x, bias=bias)
        return grad_x, gpu_kernels().column_sums(grad_x), None


@functools.cache
def _window_factors(channels: int, n: int, towers: int, number_bytes: int):
    return compiled_kernels().window_factors(channels, n, towers, number_bytes)


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
    if x.device.type == "cpu":
        images = max(1, CACHE_BLOCK_BYTES // (x[0].numel() * x.element_size()))
    return [slice(first, first + images) for first in range(0, len(x), images)]


def _maps_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)  # [N, H, W, C]: contiguous where x is channels_last


def _power(d: Tensor, beta: float) -> Tensor:
    if beta == 0.75:  # two square roots are several times faster than a power
        root = d.rsqrt()
        return root.mul_(root.sqrt())
    return d.pow(-beta)
