"""Ten classes of pictures that the program draws itself, so that everything can be tried without ImageNet.

A picture is a pattern in a class's ink on a ground of any hue, crossed by a few lines, under noise. Position, size,
angle, bend, hue and light vary; what names the class is its shape or texture, helped by its hue.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# A pattern takes coordinates u and v, float32 [height, width], in short sides of the picture from the pattern's
# middle, and returns the distance to the pattern's edge in the same unit: above 0 inside, below 0 outside.
Pattern = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _disc(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.24, 0.4) - np.hypot(u, v * rng.uniform(1, 1.2))


def _ring(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    radius = rng.uniform(0.25, 0.38)
    return rng.uniform(0.12, 0.22) * radius - np.abs(np.hypot(u, v) - radius)


def _half_planes(u: np.ndarray, v: np.ndarray, count: int, distance: float) -> list[np.ndarray]:
    """Return distances to `count` lines evenly around the middle, each [height, width], above 0 on its side."""
    angles = 2 * np.pi / count * np.arange(count)
    return [distance - np.float32(np.cos(a)) * u - np.float32(np.sin(a)) * v for a in angles]


def _triangle(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.minimum.reduce(_half_planes(u, v, 3, rng.uniform(0.16, 0.24)))


def _star(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Inside a pentagram is what lies on the inner side of at least four of its five lines.
    least = second = np.float32(np.inf)
    for plane in _half_planes(u, v, 5, rng.uniform(0.1, 0.15)):
        second = np.minimum(second, np.maximum(least, plane))
        least = np.minimum(least, plane)
    return second


def _cross(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    length = rng.uniform(0.28, 0.42)
    u, v, width = np.abs(u), np.abs(v), length * rng.uniform(0.22, 0.34)
    return np.maximum(np.minimum(length - u, width - v), np.minimum(width - u, length - v))


def _spiral(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    radius = np.hypot(u, v)
    turns = rng.uniform(6, 9)  # a short side
    handedness = rng.choice([-1, 1])
    wave = np.sin(handedness * np.arctan2(v, u) + np.float32(2 * np.pi * turns) * radius)
    return np.minimum(wave / np.float32(2 * np.pi * turns), rng.uniform(0.36, 0.46) - radius)


def _stripes(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    frequency = 2 * np.pi * rng.uniform(5, 10)
    bend = rng.uniform(0.03, 0.06) * np.sin(np.float32(rng.uniform(6, 10)) * v)
    wave = np.sin(np.float32(frequency) * (u + bend.astype(np.float32)))
    return (wave + np.float32(rng.uniform(-0.3, 0.3))) / np.float32(frequency)


def _checkerboard(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    period = np.float32(rng.uniform(0.2, 0.4))
    a, b = (np.abs(np.mod(w, period) - period / 2) - period / 4 for w in (u, v))
    return np.sign(a * b) * np.minimum(np.abs(a), np.abs(b))


def _bricks(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height = np.float32(rng.uniform(0.09, 0.16))
    length, mortar = height * np.float32(rng.uniform(2, 2.6)), height * np.float32(rng.uniform(0.08, 0.13))
    row = np.floor(v / height)
    along = np.mod(u + row * (length / 2), length)
    across = v - row * height
    return np.minimum(length / 2 - np.abs(along - length / 2), height / 2 - np.abs(across - height / 2)) - mortar


def _dots(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    period = np.float32(rng.uniform(0.12, 0.24))
    a, b = (np.mod(w, period) - period / 2 for w in (u, v))
    return period * np.float32(rng.uniform(0.26, 0.36)) - np.hypot(a, b)


@dataclass(frozen=True)
class DrawnClass:
    """One class of the sample. Its label is its position in CLASSES, which is sorted by wnid."""

    wnid: str  # not of WordNet, whose noun numbers end below n16000000
    ilsvrc_id: int  # ILSVRC2012_ID; no class's is its label + 1, so that a mix-up of the two numberings shows
    words: str
    gloss: str
    pattern: Pattern
    hue: float  # degrees
    hue_spread: float  # degrees to either side
    saturation: tuple[float, float]
    value: tuple[float, float]

    @property
    def is_texture(self) -> bool:
        """Whether the pattern fills the whole picture."""
        return self.pattern in (_stripes, _checkerboard, _bricks, _dots)


CLASSES = (
    DrawnClass("n90000110", 4, "red disc, disk", "a filled circle or ellipse in red",
               _disc, 0, 14, (0.75, 1), (0.65, 0.95)),
    DrawnClass("n90000120", 8, "zebra stripes", "bent stripes, nearly black",
               _stripes, 0, 180, (0.0, 0.5), (0.04, 0.2)),
    DrawnClass("n90000130", 1, "blue checkerboard, chequerboard", "squares in blue, every second one",
               _checkerboard, 225, 18, (0.6, 1), (0.5, 0.9)),
    DrawnClass("n90000140", 10, "green triangle", "a filled triangle of equal sides in green",
               _triangle, 125, 25, (0.6, 1), (0.4, 0.8)),
    DrawnClass("n90000150", 6, "blue ring, annulus", "a circle's outline in blue",
               _ring, 215, 20, (0.65, 1), (0.6, 1)),
    DrawnClass("n90000160", 2, "yellow star, pentagram", "a filled star of five points in yellow",
               _star, 52, 10, (0.7, 1), (0.85, 1)),
    DrawnClass("n90000170", 9, "brick wall", "courses of bricks in rust, every second one shifted by half a brick",
               _bricks, 16, 10, (0.55, 0.85), (0.45, 0.75)),
    DrawnClass("n90000180", 5, "pink polka dots", "rows of dots in pink",
               _dots, 325, 18, (0.5, 0.95), (0.75, 1)),
    DrawnClass("n90000190", 3, "turquoise spiral", "a spiral band of several turns in turquoise",
               _spiral, 178, 14, (0.6, 1), (0.6, 0.95)),
    DrawnClass("n90000200", 7, "violet cross", "a cross of two equal bars in violet",
               _cross, 275, 18, (0.55, 0.95), (0.5, 0.9)),
)


def draw(label: int, rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw one picture of class `label` (0 to 9), uint8 [height, width, 3], RGB.

    The picture is a function of the label, the generator's state and the size in pixels.
    """
    drawn = CLASSES[label]
    u, v = _coordinates(drawn, rng, width, height)
    inside = drawn.pattern(u, v, rng) * min(width, height) + 0.5  # the share of a pixel that the ink covers
    mask = Image.fromarray((np.clip(inside, 0, 1) * 255).astype(np.uint8))

    ink_hue = (drawn.hue + rng.uniform(-1, 1) * drawn.hue_spread) % 360 / 360
    ink = np.array(colorsys.hsv_to_rgb(ink_hue, rng.uniform(*drawn.saturation), rng.uniform(*drawn.value)))
    ground = _ground_colour(ink, rng)
    picture = _mottled(ground, 0.12, rng, width, height)
    picture.paste(_mottled(ink, 0.04, rng, width, height), mask=mask)
    _cross_with_lines(picture, rng)

    noise = int(rng.integers(1, 12))  # to either side, of 255
    pixels = np.asarray(picture).astype(np.int16)
    pixels += rng.integers(0, 2 * noise + 1, pixels.shape, dtype=np.uint8)
    pixels -= noise
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)


def _coordinates(
    drawn: DrawnClass, rng: np.random.Generator, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return u and v, float32 [height, width]: the picture shifted, turned and gently bent."""
    short, angle = min(width, height), rng.uniform(0, 2 * np.pi)
    # A shape stays in the picture's middle square, which is what the preprocessing keeps.
    shift = 1.0 if drawn.is_texture else 0.13
    x = (np.arange(width) - width / 2) / short + rng.uniform(-shift, shift)
    y = (np.arange(height) - height / 2) / short + rng.uniform(-shift, shift)
    bend = rng.uniform(-0.02, 0.02, 4)
    wave_x, wave_y = (np.sin(rng.uniform(4, 9) * w + rng.uniform(0, 2 * np.pi)) for w in (x, y))
    u_x, u_y = np.cos(angle) * x + bend[0] * wave_x, np.sin(angle) * y + bend[1] * wave_y
    v_x, v_y = -np.sin(angle) * x + bend[2] * wave_x, np.cos(angle) * y + bend[3] * wave_y
    u, v = (np.add.outer(b.astype(np.float32), a.astype(np.float32)) for a, b in ((u_x, u_y), (v_x, v_y)))
    return u, v


def _ground_colour(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a colour [3], 0-1, of any hue, whose lightness differs enough to tell it from `ink` in a grey picture."""
    weights = np.array([0.299, 0.587, 0.114])  # of luma, ITU-R BT.601, as in JPEG
    luma = weights @ ink
    wanted = rng.uniform(0.05, luma - 0.3) if luma > 0.5 else rng.uniform(luma + 0.3, 0.95)
    ground = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.6), 1))
    return np.clip(ground * wanted / (weights @ ground), 0, 1)


def _mottled(colour: np.ndarray, spread: float, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return a picture of one colour [3], 0-1, with soft spots whose standard deviation is `spread`."""
    cells = int(rng.integers(3, 9))
    spots = colour + spread * rng.standard_normal((cells, cells, 1)) + spread / 3 * rng.standard_normal(
        (cells, cells, 3)
    )
    small = Image.fromarray((np.clip(spots, 0, 1) * 255).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _cross_with_lines(picture: Image.Image, rng: np.random.Generator) -> None:
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 5)):
        ends = rng.uniform(-0.2, 1.2, (2, 2)) * picture.size
        thickness = max(1, int(rng.uniform(0.005, 0.025) * min(picture.size)))
        pen.line([tuple(end) for end in ends.tolist()], tuple(rng.integers(0, 256, 3).tolist()), thickness)
