"""Matplotlib without a screen and without global state; each picture as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pipeline.files import creating

matplotlib.rcParams["text.parse_math"] = False  # "$" in a class's name is no formula


def figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(drawing: Figure, path: Path) -> list[Path]:
    """Write path.png and path.svg; the same bytes for the same picture."""
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        written.append(path.with_name(path.name + suffix))
        with matplotlib.rc_context({"svg.hashsalt": "alexnet"}), creating(written[-1]) as file:
            drawing.savefig(file, format=suffix[1:], dpi=120, metadata=metadata)
    return written
