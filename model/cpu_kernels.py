"""Response normalisation on the CPU, forward and backward, each in one pass over memory (Numba).

The normalisation's arrays are [places, C], the channels of a place side by side: float32, or uint16 for the bits of
bfloat16, which NumPy lacks; arithmetic is in single precision. A few places at a time go through buffers that stay in a
core's first cache, so that memory is read and written once. Loops run over places and channels alike; what a window
must not reach (the next place, the other tower) is multiplied by a zero of `near`.
"""

from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload
from numpy import float32, int32, uint16, uint32

REACH = 2  # channels to either side: windows of up to 5
BLOCK_BYTES = 1536  # of each array at a time, about: so few that the next are on their way before these are done

# No reordering of sums: every place's result is the same wherever the work is cut.
_compiled = dict(nogil=True, fastmath={"nsz", "contract"}, error_model="numpy")
try:
    numba.njit(cache=True)(lambda: None)
    _compiled["cache"] = True
except RuntimeError:  # no folder to keep machine code in
    pass


def window_factors(channels: int, n: int, towers: int, number_bytes: int) -> np.ndarray:
    """Return `near` [5, block]: 1 where the channel at offset -2 ... 2 lies in the window, for a block of places."""
    c = np.arange(channels)
    places = max(1, BLOCK_BYTES // number_bytes // channels)
    factors = []
    for offset in range(-REACH, REACH + 1):
        j = c + offset
        same_tower = (j >= 0) & (j < channels) & (j * towers // channels == c * towers // channels)
        factors.append(np.tile(same_tower & (abs(offset) <= n // 2), places))
    return np.array(factors, float32)


def _number(stored):
    """Return a number of an array as float32."""


def _stored(number, array):
    """Return a float32 as `array` holds it."""


@overload(_number, inline="always")
def _number_of_its_type(stored):
    if stored == numba.uint16:
        return lambda stored: uint32(uint32(stored) << uint32(16)).view(float32)
    return lambda stored: stored


@overload(_stored, inline="always")
def _stored_as_its_type(number, array):
    if array.dtype == numba.uint16:
        return lambda number, array: _bfloat16_bits(number)
    return lambda number, array: number


@numba.njit(inline="always")
def _bfloat16_bits(number):
    """To the nearest, halves to the even one. A NaN of arithmetic stays one."""
    bits = float32(number).view(uint32)
    odd = uint32(bits >> uint32(16)) & uint32(1)
    return uint16(uint32(bits + uint32(0x7FFF) + odd) >> uint32(16))


@numba.njit(inline="always")
def _activation(stored, floor):
    x = _number(stored)
    return floor if x <= floor else x


@numba.njit(inline="always")
def _fourth_root_of_inverse(s):
    """s^(-1/4) to 3e-7 of it: a guess y from the bits of s > 0, then y (1 - m)^(-1/4) with m = 1 - s y^4, |m| < 0.1236.

    The polynomial is the best of degree 4 for these m, to 1.5e-7. Several times faster than two square roots and a
    division.
    """
    y = int32(int32(0x4F581800) - (float32(s).view(int32) >> int32(2))).view(float32)
    square = y * y
    m = float32(1) - s * (square * square)
    p = float32(0.11874993) + float32(0.09699606) * m
    p = float32(0.15623853) + p * m
    p = float32(0.24999402) + p * m
    return y + y * (p * m)


# Indices are plain loop variables over slices, and rows of `near` are indexed, not unpacked: other ways the compiler
# does not use vectors and is eight times slower.


@numba.njit(**_compiled)
def normalise(x, y, near, k, alpha, floor):
    """Write a / (k + alpha sum a^2)^(3/4) to y; a is x, but at least `floor`. x, y [places, C]."""
    size = near.shape[1]
    k, alpha, floor = float32(k), float32(alpha), float32(floor)
    left2, left1, right1, right2 = near[0], near[1], near[3], near[4]
    padded = np.zeros(size + 2 * REACH, float32)
    x, y = x.reshape(-1), y.reshape(-1)
    for first in range(0, x.size, size):
        last = min(first + size, x.size)
        here, out = x[first:last], y[first:last]
        length = last - first
        squares = padded[REACH : REACH + length]
        for i in range(length):
            a = _activation(here[i], floor)
            squares[i] = a * a
        l2, l1, r1, r2 = padded[:length], padded[1 : 1 + length], padded[3 : 3 + length], padded[4 : 4 + length]
        for i in range(length):
            total = squares[i] + left1[i] * l1[i] + right1[i] * r1[i] + left2[i] * l2[i] + right2[i] * r2[i]
            root = _fourth_root_of_inverse(k + alpha * total)
            a = _activation(here[i], floor)
            out[i] = _stored(a * root * root * root, out)


@numba.njit(**_compiled)
def normalise_backward(x, grad, grad_x, near, k, alpha, floor):
    """Write dL/dx to grad_x, from x and grad = dL/dy. All [places, C]. Nothing but x is needed of the forward pass."""
    size = near.shape[1]
    k, alpha, floor, factor = float32(k), float32(alpha), float32(floor), float32(1.5 * alpha)  # 2 alpha beta
    left2, left1, right1, right2 = near[0], near[1], near[3], near[4]
    padded, padded_through = np.zeros(size + 2 * REACH, float32), np.zeros(size + 2 * REACH, float32)
    direct = np.zeros(size, float32)
    x, grad, grad_x = x.reshape(-1), grad.reshape(-1), grad_x.reshape(-1)
    for first in range(0, x.size, size):
        last = min(first + size, x.size)
        here, above, out = x[first:last], grad[first:last], grad_x[first:last]
        length = last - first
        squares, through = padded[REACH : REACH + length], padded_through[REACH : REACH + length]
        for i in range(length):
            a = _activation(here[i], floor)
            squares[i] = a * a
        l2, l1, r1, r2 = padded[:length], padded[1 : 1 + length], padded[3 : 3 + length], padded[4 : 4 + length]
        for i in range(length):
            total = squares[i] + left1[i] * l1[i] + right1[i] * r1[i] + left2[i] * l2[i] + right2[i] * r2[i]
            root = _fourth_root_of_inverse(k + alpha * total)
            a = _activation(here[i], floor)
            square = root * root
            d = _number(above[i]) * square * root
            direct[i] = d
            through[i] = d * a * square * square
        l2, l1 = padded_through[:length], padded_through[1 : 1 + length]
        r1, r2 = padded_through[3 : 3 + length], padded_through[4 : 4 + length]
        for i in range(length):
            total = through[i] + left1[i] * l1[i] + right1[i] * r1[i] + left2[i] * l2[i] + right2[i] * r2[i]
            a = _number(here[i])
            out[i] = _stored(float32(0) if a <= floor else direct[i] - factor * a * total, out)
