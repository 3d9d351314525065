"""What surrounds the products: biases, ReLU, images in blocks, and the update rule. Arithmetic in single precision."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.gpu_kernels.device import on_device_of

NUMBERS = 1024  # a program
ROWS, COLUMNS, TILES = 64, 64, 8  # of a program that sums columns: so many tiles of rows


@triton.jit
def _bias_relu(x_ptr, bias_ptr, y_ptr, numbers, CHANNELS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = i < numbers
    x = tl.load(x_ptr + i, mask=inside).to(tl.float32) + tl.load(bias_ptr + i % CHANNELS, mask=inside).to(tl.float32)
    tl.store(y_ptr + i, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(y_ptr.dtype.element_ty), mask=inside)


def bias_relu(x: Tensor, bias: Tensor, y: Tensor) -> None:
    """Write max(x + bias, 0) to y: [N, C, H, W] in channels_last, of less than 2^31 numbers, bias [C]."""
    _over(x.numel(), x, _bias_relu, x, bias, y, x.numel(), CHANNELS=x.shape[1])


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _column_sums(x_ptr, sums_ptr, rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 TILES: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) * (ROWS * TILES) + tl.arange(0, ROWS)
    total = tl.full([ROWS, COLUMNS], 0, tl.float32)
    for _ in range(TILES):
        inside = (row < rows)[:, None] & (column < CHANNELS)[None, :]
        place = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
        total += tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        row += ROWS
    sums = tl.reduce(total, 0, _plus)
    tl.store(sums_ptr + tl.program_id(0) * CHANNELS + column, sums, mask=column < CHANNELS)


def column_sums(x: Tensor) -> Tensor:
    """Return float32 [C], the sums over images and places of x [N, C, H, W] in channels_last; always the same."""
    channels = x.shape[1]
    rows = x.numel() // channels
    parts = triton.cdiv(rows, ROWS * TILES)
    sums = torch.empty(parts, channels, device=x.device)
    if parts:
        with on_device_of(x):
            _column_sums[(parts, triton.cdiv(channels, COLUMNS))](x, sums, rows, CHANNELS=channels, ROWS=ROWS,
                                                                  COLUMNS=COLUMNS, TILES=TILES)
    return sums.sum(0)


@triton.jit
def _space_to_depth(images_ptr, blocks_ptr, numbers, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
                    STRIDE: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    channel, x_inside, y_inside = i % CHANNELS, i // CHANNELS % STRIDE, i // (CHANNELS * STRIDE) % STRIDE
    block = i // (CHANNELS * STRIDE * STRIDE)
    x = block % BLOCKS * STRIDE + x_inside
    y = block // BLOCKS % BLOCKS * STRIDE + y_inside
    place = (block // (BLOCKS * BLOCKS) * HEIGHT + y) * WIDTH + x
    there = (i < numbers) & (y < HEIGHT) & (x < WIDTH)
    number = tl.load(images_ptr + place * CHANNELS + channel, mask=there, other=0.0)
    tl.store(blocks_ptr + i, number.to(blocks_ptr.dtype.element_ty), mask=i < numbers)


def space_to_depth(images: Tensor, blocks: Tensor, stride: int) -> None:
    """Write images [N, C, H, W], channels_last, to blocks [N, B, B, stride, stride, C], zeros beyond the image.

    Both have less than 2^31 numbers.
    """
    _over(blocks.numel(), blocks, _space_to_depth, images, blocks, blocks.numel(), HEIGHT=images.shape[2],
          WIDTH=images.shape[3], CHANNELS=images.shape[1], STRIDE=stride, BLOCKS=blocks.shape[1])


@triton.jit
def _update(weight_ptr, velocity_ptr, grad_ptr, rounded_ptr, settings_ptr, numbers, SIZE: tl.constexpr):
    momentum, decay, rate = tl.load(settings_ptr), tl.load(settings_ptr + 1), tl.load(settings_ptr + 2)
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = i < numbers
    weight = tl.load(weight_ptr + i, mask=inside)
    velocity = tl.load(velocity_ptr + i, mask=inside)
    grad = tl.load(grad_ptr + i, mask=inside).to(tl.float32)
    velocity = momentum * velocity - decay * weight - rate * grad
    weight += velocity
    tl.store(velocity_ptr + i, velocity, mask=inside)
    tl.store(weight_ptr + i, weight, mask=inside)
    tl.store(rounded_ptr + i, weight.to(rounded_ptr.dtype.element_ty), mask=inside)


def momentum_update(weight: Tensor, velocity: Tensor, grad: Tensor, rounded: Tensor, settings: Tensor) -> None:
    """v <- momentum v - decay w - rate g ; w <- w + v, in place (section 5), and `rounded` <- w.

    Weight and velocity are float32, gradient and `rounded` of half precision; all of one shape, contiguous. `settings`
    is float32 [3]: momentum, decay, rate. On the device, so that a CUDA graph goes on with others.
    """
    _over(weight.numel(), weight, _update, weight, velocity, grad, rounded, settings, weight.numel())


def _over(numbers: int, of: Tensor, kernel, *arguments, **settings) -> None:
    if numbers:
        with on_device_of(of):
            kernel[(triton.cdiv(numbers, NUMBERS),)](*arguments, SIZE=NUMBERS, **settings)
