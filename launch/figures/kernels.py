"""The first layer's kernels (figure 3), and how much of each is colour."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from launch.figures.drawing import figure

COLUMNS = 16


def colour_selectivity(kernels: np.ndarray) -> np.ndarray:
    """Return [K] in 0-1 for kernels [K, 3, h, w]: the share of a kernel's energy that a grey picture cannot reach.

    1 - |w_grey|^2 / |w|^2, w_grey being the mean over R, G and B at each place: 0 where the three are equal, 1 where
    they add up to 0 everywhere, 2/3 on average of independent numbers. It asks of the weights what Rafegas and
    Vanrell's colour selectivity index (Vision Research 151, 2018) asks of activations: how much is lost when the colour
    goes.
    """
    energy = (kernels**2).sum((1, 2, 3))
    grey = 3 * (kernels.mean(1) ** 2).sum((1, 2))
    return 1 - np.divide(grey, energy, out=np.ones_like(energy), where=energy > 0)


def draw_kernels(kernels: np.ndarray, towers: int) -> tuple[Figure, list[float]]:
    """Draw kernels float [K, 3, h, w] in RGB, the towers apart; return each tower's mean selectivity too."""
    parts = np.split(kernels, towers)
    columns = min(COLUMNS, len(parts[0]))
    rows = -(-len(parts[0]) // columns)
    means = [float(colour_selectivity(part).mean()) for part in parts]
    drawing = figure(8, towers * (0.5 * rows + 0.4))
    panels = drawing.subfigures(towers, 1, squeeze=False)[:, 0]
    for number, (panel, part, mean) in enumerate(zip(panels, parts, means)):
        panel.suptitle(f"tower {number}: mean colour selectivity {mean:.2f}" if towers > 1
                       else f"mean colour selectivity {mean:.2f}", fontsize=10)
        for axes, place in zip(panel.subplots(rows, columns, squeeze=False).flat, range(rows * columns)):
            axes.axis("off")
            if place < len(part):
                low, high = part[place].min(), part[place].max()
                picture = (part[place] - low) / (high - low) if high > low else np.full_like(part[place], 0.5)
                axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
    return drawing, means
