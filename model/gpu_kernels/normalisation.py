"""Response normalisation, alone and with the max-pooling that follows it. Arithmetic is in single precision.

Images are channels_last. A program works on groups of four channels that lie side by side, in registers: the groups to
the left and right hold what a window of up to five reaches, and what its gradient reaches.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.gpu_kernels.device import on_device_of

GROUPS = 128  # a program
POOL = 3  # places, both ways, of the pooling windows, which begin at every second place


@triton.jit
def _split(x, SIZE: tl.constexpr):
    """[SIZE, 4] -> its four columns."""
    even, odd = tl.split(tl.reshape(x, [SIZE, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _joined(x0, x1, x2, x3, SIZE: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [SIZE, 4])


@triton.jit
def _four(ptr, first, channel, there, MAPS: tl.constexpr, SIZE: tl.constexpr):
    """Load as float32 the numbers `first`, first + 1, ... of channels `channel`, ...; 0 beyond the tower's maps."""
    i = tl.arange(0, 4)[None, :]
    mask = there[:, None]
    if MAPS % 4:
        mask = mask & (channel[:, None] + i < MAPS)
    return _split(tl.load(ptr + first[:, None] + i, mask=mask, other=0).to(tl.float32), SIZE)


@triton.jit
def _store_four(ptr, first, channel, inside, x0, x1, x2, x3, MAPS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, 4)[None, :]
    mask = inside[:, None]
    if MAPS % 4:
        mask = mask & (channel[:, None] + i < MAPS)
    x = _joined(x0, x1, x2, x3, SIZE)
    tl.store(ptr + first[:, None] + i, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _biased(bias_ptr, of_all, channel, there, x0, x1, x2, x3, MAPS: tl.constexpr, SIZE: tl.constexpr):
    """Add the biases of four channels, where there are any."""
    if bias_ptr is not None:
        b0, b1, b2, b3 = _four(bias_ptr, of_all, channel, there, MAPS, SIZE)
        x0, x1, x2, x3 = x0 + b0, x1 + b1, x2 + b2, x3 + b3
    return x0, x1, x2, x3


@triton.jit
def _activated(x, RELU: tl.constexpr):
    if RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _activations(x_ptr, bias_ptr, first, of_all, channel, there, MAPS: tl.constexpr, RELU: tl.constexpr,
                 SIZE: tl.constexpr):
    a0, a1, a2, a3 = _four(x_ptr, first, channel, there, MAPS, SIZE)
    a0, a1, a2, a3 = _biased(bias_ptr, of_all, channel, there, a0, a1, a2, a3, MAPS, SIZE)
    return _activated(a0, RELU), _activated(a1, RELU), _activated(a2, RELU), _activated(a3, RELU)


@triton.jit
def _window(a0, a1, a2, a3, a4, N: tl.constexpr):
    total = a2
    if N >= 3:
        total += a1 + a3
    if N >= 5:
        total += a0 + a4
    return total


@triton.jit
def _power(base, BETA: tl.constexpr):
    """Return base^-beta and 1 / base."""
    if BETA == 0.75:
        root = tl.rsqrt(base)
        return root * tl.sqrt(root), root * root
    return tl.exp2(-BETA * tl.log2(base)), 1 / base


@triton.jit
def _place(group, MAPS: tl.constexpr, TOWERS: tl.constexpr):
    """Return of the group with a number: its place, its first channel within its tower, and within all."""
    in_tower: tl.constexpr = (MAPS + 3) // 4
    rest = group % (TOWERS * in_tower)
    channel = 4 * (rest % in_tower)
    return group // (TOWERS * in_tower), channel, rest // in_tower * MAPS + channel


@triton.jit
def _first(place, of_all, MAPS: tl.constexpr, TOWERS: tl.constexpr):
    return place.to(tl.int64) * (TOWERS * MAPS) + of_all


@triton.jit
def _normalised(x_ptr, bias_ptr, first, of_all, channel, inside, k, alpha, MAPS: tl.constexpr, N: tl.constexpr,
                BETA: tl.constexpr, RELU: tl.constexpr, SIZE: tl.constexpr):
    """Return the four channels of y."""
    _, _, l2, l3 = _activations(x_ptr, bias_ptr, first - 4, of_all - 4, channel - 4, inside & (channel >= 4), MAPS,
                                RELU, SIZE)
    a0, a1, a2, a3 = _activations(x_ptr, bias_ptr, first, of_all, channel, inside, MAPS, RELU, SIZE)
    r0, r1, _, _ = _activations(x_ptr, bias_ptr, first + 4, of_all + 4, channel + 4, inside & (channel + 4 < MAPS),
                                MAPS, RELU, SIZE)
    s0, s1, s2, s3, s4, s5, s6, s7 = l2 * l2, l3 * l3, a0 * a0, a1 * a1, a2 * a2, a3 * a3, r0 * r0, r1 * r1
    y0 = a0 * _power(k + alpha * _window(s0, s1, s2, s3, s4, N), BETA)[0]
    y1 = a1 * _power(k + alpha * _window(s1, s2, s3, s4, s5, N), BETA)[0]
    y2 = a2 * _power(k + alpha * _window(s2, s3, s4, s5, s6, N), BETA)[0]
    y3 = a3 * _power(k + alpha * _window(s3, s4, s5, s6, s7, N), BETA)[0]
    return y0, y1, y2, y3


@triton.jit
def _through(grad, a, base, BETA: tl.constexpr):
    """Return g a base^(-beta - 1), and base^-beta."""
    power, inverse = _power(base, BETA)
    return grad * a * power * inverse, power


@triton.jit
def _gradient(x_ptr, bias_ptr, first, of_all, channel, inside, g0, g1, g2, g3, g4, g5, g6, g7, k, alpha,
              MAPS: tl.constexpr, N: tl.constexpr, BETA: tl.constexpr, RELU: tl.constexpr, SIZE: tl.constexpr):
    """Return the four channels of dL/dx, from dL/dy of the eight channels around them."""
    l0, l1, l2, l3 = _activations(x_ptr, bias_ptr, first - 4, of_all - 4, channel - 4, inside & (channel >= 4), MAPS,
                                  RELU, SIZE)
    x0, x1, x2, x3 = _four(x_ptr, first, channel, inside, MAPS, SIZE)
    x0, x1, x2, x3 = _biased(bias_ptr, of_all, channel, inside, x0, x1, x2, x3, MAPS, SIZE)
    a0, a1, a2, a3 = _activated(x0, RELU), _activated(x1, RELU), _activated(x2, RELU), _activated(x3, RELU)
    r0, r1, r2, r3 = _activations(x_ptr, bias_ptr, first + 4, of_all + 4, channel + 4, inside & (channel + 4 < MAPS),
                                  MAPS, RELU, SIZE)
    s0, s1, s2, s3, s4, s5 = l0 * l0, l1 * l1, l2 * l2, l3 * l3, a0 * a0, a1 * a1
    s6, s7, s8, s9, s10, s11 = a2 * a2, a3 * a3, r0 * r0, r1 * r1, r2 * r2, r3 * r3
    t0, _ = _through(g0, l2, k + alpha * _window(s0, s1, s2, s3, s4, N), BETA)
    t1, _ = _through(g1, l3, k + alpha * _window(s1, s2, s3, s4, s5, N), BETA)
    t2, p0 = _through(g2, a0, k + alpha * _window(s2, s3, s4, s5, s6, N), BETA)
    t3, p1 = _through(g3, a1, k + alpha * _window(s3, s4, s5, s6, s7, N), BETA)
    t4, p2 = _through(g4, a2, k + alpha * _window(s4, s5, s6, s7, s8, N), BETA)
    t5, p3 = _through(g5, a3, k + alpha * _window(s5, s6, s7, s8, s9, N), BETA)
    t6, _ = _through(g6, r0, k + alpha * _window(s6, s7, s8, s9, s10, N), BETA)
    t7, _ = _through(g7, r1, k + alpha * _window(s7, s8, s9, s10, s11, N), BETA)
    factor = 2 * alpha * BETA
    d0 = g2 * p0 - factor * a0 * _window(t0, t1, t2, t3, t4, N)
    d1 = g3 * p1 - factor * a1 * _window(t1, t2, t3, t4, t5, N)
    d2 = g4 * p2 - factor * a2 * _window(t2, t3, t4, t5, t6, N)
    d3 = g5 * p3 - factor * a3 * _window(t3, t4, t5, t6, t7, N)
    if RELU:
        d0, d1 = tl.where(x0 <= 0, 0.0, d0), tl.where(x1 <= 0, 0.0, d1)
        d2, d3 = tl.where(x2 <= 0, 0.0, d2), tl.where(x3 <= 0, 0.0, d3)
    return d0, d1, d2, d3


@triton.jit
def _normalise(x_ptr, bias_ptr, y_ptr, groups, k, alpha, MAPS: tl.constexpr, TOWERS: tl.constexpr,
               N: tl.constexpr, BETA: tl.constexpr, RELU: tl.constexpr, SIZE: tl.constexpr):
    group = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = group < groups
    place, channel, of_all = _place(group, MAPS, TOWERS)
    first = _first(place, of_all, MAPS, TOWERS)
    y0, y1, y2, y3 = _normalised(x_ptr, bias_ptr, first, of_all, channel, inside, k, alpha, MAPS, N, BETA, RELU, SIZE)
    _store_four(y_ptr, first, channel, inside, y0, y1, y2, y3, MAPS, SIZE)


@triton.jit
def _normalise_backward(x_ptr, bias_ptr, grad_ptr, grad_x_ptr, groups, k, alpha, MAPS: tl.constexpr,
                        TOWERS: tl.constexpr, N: tl.constexpr, BETA: tl.constexpr, RELU: tl.constexpr,
                        SIZE: tl.constexpr):
    group = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = group < groups
    place, channel, of_all = _place(group, MAPS, TOWERS)
    first = _first(place, of_all, MAPS, TOWERS)
    _, _, g0, g1 = _four(grad_ptr, first - 4, channel - 4, inside & (channel >= 4), MAPS, SIZE)
    g2, g3, g4, g5 = _four(grad_ptr, first, channel, inside, MAPS, SIZE)
    g6, g7, _, _ = _four(grad_ptr, first + 4, channel + 4, inside & (channel + 4 < MAPS), MAPS, SIZE)
    d0, d1, d2, d3 = _gradient(x_ptr, bias_ptr, first, of_all, channel, inside, g0, g1, g2, g3, g4, g5, g6, g7, k,
                               alpha, MAPS, N, BETA, RELU, SIZE)
    _store_four(grad_x_ptr, first, channel, inside, d0, d1, d2, d3, MAPS, SIZE)


@triton.jit
def _larger(best, where, y, number):
    take = (y > best) | (y != y)  # a NaN wins, as in torch
    return tl.where(take, y, best), tl.where(take, number, where)


@triton.jit
def _normalise_and_pool(x_ptr, bias_ptr, y_ptr, where_ptr, groups, k, alpha, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                        MAPS: tl.constexpr, TOWERS: tl.constexpr, N: tl.constexpr, BETA: tl.constexpr,
                        RELU: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    group = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = group < groups
    place, channel, of_all = _place(group, MAPS, TOWERS)
    pooled_height: tl.constexpr = (HEIGHT - WINDOW) // 2 + 1
    pooled_width: tl.constexpr = (WIDTH - WINDOW) // 2 + 1
    across, row = place % pooled_width, place // pooled_width
    corner = (row // pooled_height * HEIGHT + 2 * (row % pooled_height)) * WIDTH + 2 * across
    b0 = tl.full([SIZE], float("-inf"), tl.float32)
    b1, b2, b3 = b0, b0, b0
    w0 = tl.full([SIZE], 0, tl.int32)
    w1, w2, w3 = w0, w0, w0
    for number in tl.static_range(WINDOW * WINDOW):
        first = _first(corner + number // WINDOW * WIDTH + number % WINDOW, of_all, MAPS, TOWERS)
        y0, y1, y2, y3 = _normalised(x_ptr, bias_ptr, first, of_all, channel, inside, k, alpha, MAPS, N, BETA, RELU,
                                     SIZE)
        # Compared as they would be stored: among equal ones the first is the largest.
        b0, w0 = _larger(b0, w0, y0.to(y_ptr.dtype.element_ty).to(tl.float32), number)
        b1, w1 = _larger(b1, w1, y1.to(y_ptr.dtype.element_ty).to(tl.float32), number)
        b2, w2 = _larger(b2, w2, y2.to(y_ptr.dtype.element_ty).to(tl.float32), number)
        b3, w3 = _larger(b3, w3, y3.to(y_ptr.dtype.element_ty).to(tl.float32), number)
    first = _first(place, of_all, MAPS, TOWERS)
    _store_four(y_ptr, first, channel, inside, b0, b1, b2, b3, MAPS, SIZE)
    _store_four(where_ptr, first, channel, inside, w0, w1, w2, w3, MAPS, SIZE)


@triton.jit
def _of_window(grad_ptr, where_ptr, first, channel, there, number, MAPS: tl.constexpr, SIZE: tl.constexpr):
    """Return of four channels the gradient of a window's maximum where that was at place `number` of it, else 0."""
    g0, g1, g2, g3 = _four(grad_ptr, first, channel, there, MAPS, SIZE)
    w0, w1, w2, w3 = _four(where_ptr, first, channel, there, MAPS, SIZE)
    return (tl.where(w0 == number, g0, 0.0), tl.where(w1 == number, g1, 0.0), tl.where(w2 == number, g2, 0.0),
            tl.where(w3 == number, g3, 0.0))


@triton.jit
def _normalise_and_pool_backward(x_ptr, bias_ptr, grad_ptr, where_ptr, grad_x_ptr, groups, k, alpha,
                                 HEIGHT: tl.constexpr, WIDTH: tl.constexpr, MAPS: tl.constexpr, TOWERS: tl.constexpr,
                                 N: tl.constexpr, BETA: tl.constexpr, RELU: tl.constexpr, WINDOW: tl.constexpr,
                                 SIZE: tl.constexpr):
    group = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = group < groups
    place, channel, of_all = _place(group, MAPS, TOWERS)
    pooled_height: tl.constexpr = (HEIGHT - WINDOW) // 2 + 1
    pooled_width: tl.constexpr = (WIDTH - WINDOW) // 2 + 1
    x, y, image = place % WIDTH, place // WIDTH % HEIGHT, place // (WIDTH * HEIGHT)
    g0 = tl.full([SIZE], 0, tl.float32)
    g1, g2, g3, g4, g5, g6, g7 = g0, g0, g0, g0, g0, g0, g0
    for window in tl.static_range(4):  # those that a place can lie in, at most
        down, across = y // 2 - window // 2, x // 2 - window % 2
        dy, dx = y - 2 * down, x - 2 * across
        there = (inside & (down >= 0) & (down < pooled_height) & (across >= 0) & (across < pooled_width)
                 & (dy < WINDOW) & (dx < WINDOW))
        number = (dy * WINDOW + dx).to(tl.float32)
        first = _first((image * pooled_height + down) * pooled_width + across, of_all, MAPS, TOWERS)
        _, _, p0, p1 = _of_window(grad_ptr, where_ptr, first - 4, channel - 4, there & (channel >= 4), number, MAPS,
                                  SIZE)
        p2, p3, p4, p5 = _of_window(grad_ptr, where_ptr, first, channel, there, number, MAPS, SIZE)
        p6, p7, _, _ = _of_window(grad_ptr, where_ptr, first + 4, channel + 4, there & (channel + 4 < MAPS), number,
                                  MAPS, SIZE)
        g0, g1, g2, g3, g4, g5, g6, g7 = g0 + p0, g1 + p1, g2 + p2, g3 + p3, g4 + p4, g5 + p5, g6 + p6, g7 + p7
    first = _first(place, of_all, MAPS, TOWERS)
    d0, d1, d2, d3 = _gradient(x_ptr, bias_ptr, first, of_all, channel, inside, g0, g1, g2, g3, g4, g5, g6, g7, k,
                               alpha, MAPS, N, BETA, RELU, SIZE)
    _store_four(grad_x_ptr, first, channel, inside, d0, d1, d2, d3, MAPS, SIZE)


def normalise(x: Tensor, y: Tensor, bias: Tensor | None, n: int, towers: int, k: float, alpha: float, beta: float,
              relu: bool) -> None:
    """Write the normalisation of x, plus bias [C] where given, to y.

    x and y are [N, C, H, W] in channels_last, C a multiple of towers; n is at most 5.
    """
    _launch(_normalise, x, (x, bias, y), n, towers, k, alpha, beta, relu)


def normalise_backward(x: Tensor, grad: Tensor, grad_x: Tensor, bias: Tensor | None, n: int, towers: int, k: float,
                       alpha: float, beta: float, relu: bool) -> None:
    """Write dL/dx to grad_x, from x and grad = dL/dy; shapes as in `normalise`."""
    _launch(_normalise_backward, x, (x, bias, grad, grad_x), n, towers, k, alpha, beta, relu)


def normalise_and_pool(x: Tensor, y: Tensor, where: Tensor, bias: Tensor | None, n: int, towers: int, k: float,
                       alpha: float, beta: float, relu: bool) -> None:
    """Write to y the maxima of the normalisation over windows of 3 x 3 places, two apart, and to `where` their places.

    y and where (uint8, row by row from 0 to 8) are [N, C, (H - 3) // 2 + 1, (W - 3) // 2 + 1] in channels_last.
    """
    _launch(_normalise_and_pool, y, (x, bias, y, where), n, towers, k, alpha, beta, relu, **_sides(x))


def normalise_and_pool_backward(x: Tensor, grad: Tensor, where: Tensor, grad_x: Tensor, bias: Tensor | None, n: int,
                                towers: int, k: float, alpha: float, beta: float, relu: bool) -> None:
    """Write dL/dx to grad_x, from x, grad = dL/dy and `where`; shapes as in `normalise_and_pool`."""
    _launch(_normalise_and_pool_backward, x, (x, bias, grad, where, grad_x), n, towers, k, alpha, beta, relu,
            **_sides(x))


def _sides(x: Tensor) -> dict[str, int]:
    return {"HEIGHT": x.shape[2], "WIDTH": x.shape[3], "WINDOW": POOL}


def _launch(kernel, over: Tensor, tensors: tuple[Tensor | None, ...], n: int, towers: int, k: float, alpha: float,
            beta: float, relu: bool, **sides: int) -> None:
    """Run `kernel` for every group of `over` [N, C, H, W]."""
    images, channels, height, width = over.shape
    maps = channels // towers
    groups = images * height * width * towers * triton.cdiv(maps, 4)
    if groups:
        with on_device_of(over):
            kernel[(triton.cdiv(groups, GROUPS),)](*tensors, groups, k, alpha, MAPS=maps, TOWERS=towers, N=n, BETA=beta,
                                                   RELU=relu, SIZE=GROUPS, **sides)
