"""What docs/scaling.md shows: tables in Markdown, and a chart."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from launch.bench.scaling import DATA, GPUS, LAYOUTS, Machine, checks, rows, step_parts
from launch.figures.drawing import figure
from model.recipe import NOTES


def markdown(machines: tuple[Machine, Machine], data: str) -> str:
    """Return the tables of docs/scaling.md, each under its heading there."""
    head = ("GPUs", "layout", "batch", "images a network", "steps/s", "images/s", "efficiency, %", "hours", "limit")
    tables = []
    for batch, heading in (NOTES.batch, "Batch 128, as the recipes have it"), (None, "128 images a network"):
        lines = []
        for row in rows(machines, data, batch):
            found = [""] * 4 + ["more networks than images"]
            if "parts" in row:
                found = [_span(row["steps_per_s"]), _span(row["images_per_s"]),
                         _span([100 * share for share in row["efficiency"]]), _span(row["hours"]),
                         _limit(row["parts"])]
            lines.append((str(row["gpus"]), row["layout"], str(row["batch"]), f"{row['images_a_network']:g}", *found))
        tables += [f"## {heading}\n", _table(head, lines)]
    alone = []
    for name, of in DATA.items():
        one, pair = ([gpus * NOTES.batch / gpus / sum(step_parts(machine, name, gpus, gpus, NOTES.batch).values())
                      for machine in machines] for gpus in LAYOUTS)
        reading = [[rate * gpus * of.image_bytes / 1e9 for rate in one] for gpus in (1, 8, 512)]
        alone.append((name, _span(one), _span(pair), *map(_span, reading)))
    head = ("data", "images/s, one GPU", "a pair on two", "GB/s to read: one GPU", "8", "512")
    tables += ["## Reading\n", _table(head, alone)]
    lines = [(check["what"], _short(check["predicted"]), _short(check["measured"]),
              f"{check['predicted'] / check['measured']:.2f}") for check in checks()]
    head = ("two CPU cores", "predicted", "measured", "predicted / measured")
    tables += ["## Beside what was measured\n", _table(head, lines)]
    return "\n".join(tables)


def draw_efficiency(machines: tuple[Machine, Machine], data: str) -> Figure:
    """Draw efficiency over GPUs, between slow and fast: a panel for either batch."""
    drawing = figure(8, 3.6)
    for axes, batch in zip(drawing.subplots(1, 2, sharey=True), (NOTES.batch, None)):  # of all, of a network
        for towers, colour in ((1, "#c0392b"), (2, "#4878a8")):
            found = [row for row in rows(machines, data, batch) if row["layout"] == LAYOUTS[towers] and "parts" in row]
            at, slow, fast = zip(*((row["gpus"], *row["efficiency"]) for row in found))
            axes.fill_between(at, slow, fast, color=colour, alpha=0.25, linewidth=0)
            axes.plot(at, slow, "o-", at, fast, "o-", color=colour, markersize=3, linewidth=1)
            axes.plot([], [], "o-", color=colour, markersize=3,
                      label="whole network in each GPU" if towers == 1 else "pairs of towers")
        axes.set(title="batch 128" if batch else "128 images a network", xlabel="GPUs", xscale="log", xlim=(0.8, 640),
                 ylim=(0, 1.05))
        axes.set_xticks(GPUS, map(str, GPUS))
        axes.xaxis.set_minor_locator(NullLocator())
    drawing.axes[0].set_ylabel("efficiency")
    drawing.axes[0].legend(fontsize=8)
    return drawing


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ("---",) * len(head), *lines))


def _limit(cases: list[dict[str, float]]) -> str:
    """Name the longest part of a step and its share, of the slow case and the fast one."""
    names = [max(parts, key=parts.get) for parts in cases]
    shares = [100 * parts[name] / sum(parts.values()) for parts, name in zip(cases, names)]
    if names[0] == names[1]:
        return f"{names[0]} {_span(shares)} %"
    return "; ".join(f"{name} {_short(share, 2)} %" for name, share in zip(names, shares))


def _span(pair: list[float]) -> str:
    """The range of two in two digits, or what is the same in both in three."""
    low, high = sorted(pair)
    return _short(low) if math.isclose(low, high) else f"{_short(low, 2)} to {_short(high, 2)}"


def _short(value: float, digits: int = 3) -> str:
    return f"{float(f'{value:.{digits}g}'):,.10g}"
