"""Pictures with what the network says of them, and their nearest training images (figure 4)."""

from __future__ import annotations

import io
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from launch.figures.drawing import figure
from launch.predict import Guess
from pipeline.shards import ShardImages

RIGHT, WRONG, OTHER = "#2f7d4f", "#c0392b", "#b9c3cf"


def stored_picture(images: ShardImages, index: int) -> np.ndarray:
    """Return what the shards hold of an image, uint8 [256, 256, 3]."""
    stored = images.stored(index)
    return stored if images.store == "raw" else np.asarray(Image.open(io.BytesIO(stored.tobytes())).convert("RGB"))


def draw_guesses(pictures: list[np.ndarray], truths: list[str], guesses: list[list[Guess]], right: list[int]) -> Figure:
    """Draw pictures with bars of their guesses' probabilities. `right` is the place of the label among the guesses (-1:
    not there), `truths` what the picture shows."""
    columns = 4
    rows = -(-len(pictures) // columns)
    drawing = figure(10, 3.6 * rows)
    panels = drawing.subfigures(rows, columns, squeeze=False).flat
    for panel, picture, truth, found, place in zip(panels, pictures, truths, guesses, right):
        top, bottom = panel.subplots(2, 1, height_ratios=(1.7, 1))
        top.imshow(picture)
        top.axis("off")
        top.set_title(_short(truth, 28), fontsize=9, color=RIGHT if place == 0 else WRONG)
        colours = [RIGHT if n == place else OTHER for n in range(len(found))]
        bottom.barh(range(len(found)), [guess.probability for guess in found], color=colours)
        for n, guess in enumerate(found):
            bottom.text(0.02, n, _short(guess.words or guess.wnid, 30), fontsize=8, va="center")
        bottom.set(xlim=(0, 1), ylim=(len(found) - 0.5, -0.5), yticks=[])
        bottom.tick_params(labelsize=7)
    return drawing


def draw_neighbours(queries: list[np.ndarray], neighbours: list[list[np.ndarray]], labels: list[str],
                    of_neighbours: list[list[tuple[str, float, bool]]]) -> Figure:
    """Draw each query beside its neighbours, each of which has (words, distance, whether of the query's class)."""
    columns = 1 + max(map(len, neighbours))
    drawing = figure(1.4 * columns, 1.75 * len(queries))
    grid = drawing.subplots(len(queries), columns, squeeze=False)
    for row, query, found, label, about in zip(grid, queries, neighbours, labels, of_neighbours):
        for axes in row:
            axes.axis("off")
        _show(row[0], query, _short(label, 20), "black")
        for axes, picture, (words, distance, same) in zip(row[1:], found, about):
            _show(axes, picture, f"{_short(words, 18)}\n{distance:.2f}", RIGHT if same else WRONG)
    return drawing


def _show(axes: Axes, picture: np.ndarray, title: str, colour: str) -> None:
    axes.imshow(picture)
    axes.set_title(title, fontsize=7, color=colour)


def _short(words: str, width: int) -> str:
    words = "".join(letter if letter.isprintable() else " " for letter in words)
    return textwrap.shorten(words.split(",")[0], width, placeholder="…") or words[:width]
