"""What a benchmark prints."""

from __future__ import annotations

import statistics

import torch

from launch import facts


def result(part: str, unit: str, values: list[float], **settings) -> dict:
    return {"bench": part, unit: spread(values), **settings, "commit": facts.commit(),
            "hardware": facts.hardware(torch.device("cpu" if not torch.cuda.is_available() else "cuda"))}


def spread(values: list[float]) -> dict:
    return {"median": float(f"{statistics.median(values):.4g}"), "min": float(f"{min(values):.4g}"),
            "max": float(f"{max(values):.4g}"), "n": len(values)}
