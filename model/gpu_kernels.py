"""Response normalisation on a GPU in one pass over memory each way (Triton). Arithmetic is in single precision.

Tensors are channels_last, taken as one row of numbers in which a window's channels are neighbours.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers a program


@triton.jit
def _activation(x_ptr, place, channel, offset, inside, maps, RELU: tl.constexpr):
    """Return the numbers `offset` channels on, 0 beyond the tower's maps."""
    there = inside & (channel + offset >= 0) & (channel + offset < maps)
    x = tl.load(x_ptr + place + offset, mask=there, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(x <= 0, 0.0, x)  # a NaN stays one
    return x


@triton.jit
def _window(a0, a1, a2, a3, a4, N: tl.constexpr):
    total = a2
    if N >= 3:
        total += a1 + a3
    if N >= 5:
        total += a0 + a4
    return total


@triton.jit
def _normalise(x_ptr, y_ptr, numbers, maps, k, alpha, beta, N: tl.constexpr, RELU: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside, channel = place < numbers, (place % maps).to(tl.int32)
    a0 = _activation(x_ptr, place, channel, -2, inside, maps, RELU)
    a1 = _activation(x_ptr, place, channel, -1, inside, maps, RELU)
    a2 = _activation(x_ptr, place, channel, 0, inside, maps, RELU)
    a3 = _activation(x_ptr, place, channel, 1, inside, maps, RELU)
    a4 = _activation(x_ptr, place, channel, 2, inside, maps, RELU)
    base = k + alpha * _window(a0 * a0, a1 * a1, a2 * a2, a3 * a3, a4 * a4, N)
    y = a2 * tl.exp2(-beta * tl.log2(base))
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _through(grad_ptr, place, channel, offset, inside, maps, a, base, beta):
    """Return g x base^(-beta - 1) of the channel `offset` on, whose a and base are given."""
    there = inside & (channel + offset >= 0) & (channel + offset < maps)
    grad = tl.load(grad_ptr + place + offset, mask=there, other=0.0).to(tl.float32)
    return grad * a * tl.exp2(-(beta + 1.0) * tl.log2(base))


@triton.jit
def _normalise_backward(x_ptr, grad_ptr, grad_x_ptr, numbers, maps, k, alpha, beta, N: tl.constexpr,
                        RELU: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside, channel = place < numbers, (place % maps).to(tl.int32)
    a0 = _activation(x_ptr, place, channel, -4, inside, maps, RELU)
    a1 = _activation(x_ptr, place, channel, -3, inside, maps, RELU)
    a2 = _activation(x_ptr, place, channel, -2, inside, maps, RELU)
    a3 = _activation(x_ptr, place, channel, -1, inside, maps, RELU)
    a4 = _activation(x_ptr, place, channel, 0, inside, maps, RELU)
    a5 = _activation(x_ptr, place, channel, 1, inside, maps, RELU)
    a6 = _activation(x_ptr, place, channel, 2, inside, maps, RELU)
    a7 = _activation(x_ptr, place, channel, 3, inside, maps, RELU)
    a8 = _activation(x_ptr, place, channel, 4, inside, maps, RELU)
    q0, q1, q2, q3, q4, q5, q6, q7, q8 = (a0 * a0, a1 * a1, a2 * a2, a3 * a3, a4 * a4, a5 * a5, a6 * a6, a7 * a7,
                                          a8 * a8)
    base = k + alpha * _window(q2, q3, q4, q5, q6, N)
    t0 = _through(grad_ptr, place, channel, -2, inside, maps, a2, k + alpha * _window(q0, q1, q2, q3, q4, N), beta)
    t1 = _through(grad_ptr, place, channel, -1, inside, maps, a3, k + alpha * _window(q1, q2, q3, q4, q5, N), beta)
    t2 = _through(grad_ptr, place, channel, 0, inside, maps, a4, base, beta)
    t3 = _through(grad_ptr, place, channel, 1, inside, maps, a5, k + alpha * _window(q3, q4, q5, q6, q7, N), beta)
    t4 = _through(grad_ptr, place, channel, 2, inside, maps, a6, k + alpha * _window(q4, q5, q6, q7, q8, N), beta)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad_x = grad * tl.exp2(-beta * tl.log2(base)) - 2 * alpha * beta * a4 * _window(t0, t1, t2, t3, t4, N)
    if RELU:
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad_x = tl.where(x <= 0, 0.0, grad_x)
    tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def normalise(x: Tensor, y: Tensor, n: int, towers: int, k: float, alpha: float, beta: float, relu: bool) -> None:
    """Write the normalisation of x to y: [N, C, H, W] in channels_last, C a multiple of towers, n at most 5."""
    _launch(_normalise, (x, y), n, towers, k, alpha, beta, relu)


def normalise_backward(x: Tensor, grad: Tensor, grad_x: Tensor, n: int, towers: int, k: float, alpha: float,
                       beta: float, relu: bool) -> None:
    """Write dL/dx to grad_x, from x and grad = dL/dy; shapes as in `normalise`."""
    _launch(_normalise_backward, (x, grad, grad_x), n, towers, k, alpha, beta, relu)


def _launch(kernel, tensors: tuple[Tensor, ...], n: int, towers: int, k: float, alpha: float, beta: float,
            relu: bool) -> None:
    x = tensors[0]
    if x.numel():
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # on the CPU where Triton interprets
            kernel[(triton.cdiv(x.numel(), BLOCK),)](*tensors, x.numel(), x.shape[1] // towers, k, alpha, beta, N=n,
                                                     RELU=relu, SIZE=BLOCK)
