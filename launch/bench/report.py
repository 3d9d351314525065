"""What a benchmark prints."""

from __future__ import annotations

import statistics

from launch import facts


def result(part: str, unit: str, values: list[float], **settings) -> dict:
    return {"bench": part, unit: spread(values), **settings, "commit": facts.commit(),
            "hardware": facts.hardware(None)}


def beside(ours: list[float], rates: dict[str, list[float]]) -> dict:
    """Return every peer's rates and, as vs_PEER, ours divided by its, repeat by repeat."""
    return {"peers": {name: spread(values) for name, values in rates.items()},
            **{f"vs_{name}": spread([a / b for a, b in zip(ours, values)]) for name, values in rates.items()}}


def spread(values: list[float]) -> dict:
    return {"median": float(f"{statistics.median(values):.4g}"), "min": float(f"{min(values):.4g}"),
            "max": float(f"{max(values):.4g}"), "n": len(values)}
