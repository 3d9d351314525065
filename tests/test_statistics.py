"""Sums over the training set: exact, in any order and grouping, and whole again after they were stored."""

from __future__ import annotations

import struct
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from pipeline.statistics import PixelStatistics

SHAPE = (256, 256, 3)


def of(*images: np.ndarray) -> PixelStatistics:
    statistics = PixelStatistics()
    for image in images:
        statistics.add(image)
    return statistics


def merged(*parts: PixelStatistics) -> PixelStatistics:
    total = PixelStatistics()
    for part in parts:
        total.merge(part)
    return total


def noise(count: int, seed: int = 0, low: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(low, 256, SHAPE, dtype=np.uint8) for _ in range(count)]


def plain(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(colour), SHAPE).copy()


CASES = {
    "noise": noise(5),
    "bright noise": noise(3, 1, low=250),
    "black": [plain(0, 0, 0)] * 3,
    "white": [plain(255, 255, 255)] * 3,
    **{name: [plain(*colour)] * 2 for name, colour in
       {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}.items()},
    "black and white": [plain(0, 0, 0), plain(255, 255, 255)],
    "left and right": [np.repeat(np.uint8([0, 255]), 128)[None, :, None].repeat(256, 0).repeat(3, 2)],
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_integer_arithmetic(name):
    images = CASES[name]
    statistics = of(*images)
    stack = np.stack(images).astype(np.int64)
    flat = stack.reshape(-1, 3)
    count, total, products = len(flat), flat.sum(axis=0), flat.T @ flat
    assert statistics.images == len(images)
    mean = statistics.mean_image()
    assert mean.dtype == np.float32 and mean.shape == SHAPE
    np.testing.assert_array_equal(mean, (stack.sum(axis=0) / len(images)).astype(np.float32))
    np.testing.assert_array_equal(statistics.rgb_mean(), total / count)
    # Covariance as a fraction, then rounded once.
    expected = [[float(Fraction(int(products[i, j]), count) - Fraction(int(total[i]) * int(total[j]), count**2))
                 for j in range(3)] for i in range(3)]
    np.testing.assert_array_equal(statistics.rgb_covariance(), expected)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0, 4, 1, 3]])
def test_neither_order_nor_grouping_changes_a_bit(order):
    images = noise(6, seed=2)
    expected = of(*images).to_bytes()
    parts = [of(images[i]) for i in order]
    assert of(*(images[i] for i in order)).to_bytes() == expected
    assert merged(*parts).to_bytes() == expected
    assert merged(merged(*parts[:2]), merged(parts[2], merged(*parts[3:]))).to_bytes() == expected


def test_sums_are_widened_before_they_overflow():
    """257 x 255 is 65,535; one image more passes 16 bits."""
    white = plain(255, 255, 255)
    statistics, sizes = PixelStatistics(), {}
    for count in range(1, 259):
        statistics.add(white)
        sizes[count] = len(statistics.to_bytes())
        if count in (256, 257, 258):
            assert (statistics.mean_image() == 255).all() and (statistics.rgb_mean() == 255).all()
            assert (statistics.rgb_covariance() == 0).all()
    assert sizes[258] - sizes[257] == 2 * 256 * 256 * 3 and sizes[257] == sizes[1]
    # By merging, narrow into wide and wide into narrow, up to 64 bits.
    assert merged(statistics, of(white)).to_bytes() == merged(of(white), statistics).to_bytes()
    for _ in range(17):
        statistics.merge(PixelStatistics.from_bytes(statistics.to_bytes()))
    assert statistics.images == 258 << 17  # 33.8 million: their sum passes 32 bits
    assert (statistics.mean_image() == 255).all() and (statistics.rgb_covariance() == 0).all()
    assert PixelStatistics.from_bytes(statistics.to_bytes()).to_bytes() == statistics.to_bytes()


@pytest.mark.parametrize("count", [0, 1, 5, 257, 258])
def test_stored_and_read_again(count):
    image = noise(1, seed=3)[0]
    statistics = of(*[image] * count)
    again = PixelStatistics.from_bytes(statistics.to_bytes())
    assert again.images == count and again.to_bytes() == statistics.to_bytes()
    again.add(image)  # what was read can be written to
    statistics.add(image)
    assert again.to_bytes() == statistics.to_bytes()


def damaged() -> dict[str, bytes]:
    few, many = of(*noise(2)).to_bytes(), of(*noise(1) * 258).to_bytes()
    header = 8 + 1 + 6 * 8
    count = {value: struct.pack("<Q", value) for value in (0, 1, 2**32, 2**40, 2**63, 2**64 - 1)}
    return {
        "empty": b"", "half a header": few[:20], "header": few[:header], "cut": few[:-1], "half": few[: len(few) // 2],
        "longer": few + b"\0", "longer by a sum": few + b"\0\0", "narrow": many[: header + 2 * 256 * 256 * 3],
        "text": b"not statistics" * 1000,
        **{f"width {width}": few[:8] + bytes([width]) + few[9:] for width in (0, 1, 4, 8, 255)},
        **{f"{value} images": packed + few[8:] for value, packed in count.items()},
        "2**63 images and sums of 64 bits": count[2**63] + b"\x08" + few[9:header] + bytes(8 * 256 * 256 * 3),
        "negative images": struct.pack("<q", -1) + b"\x08" + few[9:header] + bytes(8 * 256 * 256 * 3),
        "sums too large": few[:header] + b"\xff" * (len(few) - header),
        "negative product": few[:9] + struct.pack("<q", -1) + few[17:],
        "product too large": few[:9] + struct.pack("<q", 2**62) + few[17:],
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_bytes_are_refused(name):
    data = damaged()[name]
    tracemalloc.start()
    with pytest.raises(ValueError):
        PixelStatistics.from_bytes(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_random_damage_raises_valueerror_and_nothing_else():
    rng, whole = np.random.default_rng(4), of(*noise(2)).to_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, 60, 3):
            data[place] ^= 1 << rng.integers(8)
        data = data[: rng.integers(len(data))] if rng.random() < 0.3 else data
        try:
            statistics = PixelStatistics.from_bytes(bytes(data))
            statistics.add(plain(255, 255, 255))
            assert np.isfinite(statistics.rgb_covariance()).all()
        except ValueError:
            refused += 1
    assert 100 < refused < 300
