"""Loss, errors and learning rate over a run's epochs."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from launch.figures.drawing import figure
from launch.runlog import of_the_run


def _even(records: list[dict]) -> list[dict]:
    """Join records of few steps, as at an epoch's end, to their neighbours: means of few batches would be spikes."""
    usual = max((record.get("steps", 1) for record in records), default=1)
    joined, group = [], []
    for record in records:
        group.append(record)
        weights = [one.get("steps", 1) for one in group]  # logs of earlier versions do not tell
        if sum(weights) >= usual or record is records[-1]:
            means = {name: np.average([one[name] for one in group], weights=weights)
                     for name in ("loss", "train_top1_error")}
            joined.append({**record, **means})
            group = []
    return joined


def draw_curves(records: list[dict]) -> Figure:
    """Draw the records of a log (launch.runlog.read_log)."""
    steps, epochs = _even(of_the_run(records, "steps")), of_the_run(records, "epoch")
    drawing = figure(8, 7.5)
    loss, errors, rate = drawing.subplots(3, 1, sharex=True)
    at = [record["epoch"] for record in steps]
    loss.plot(at, [record["loss"] for record in steps], linewidth=0.8)
    loss.set_ylabel("training loss")
    errors.plot(at, [record["train_top1_error"] for record in steps], linewidth=0.6, color="#b9c3cf",
                label="training, top-1 (with crops, flips, dropout)")
    for name, colour in (("top1", "#c0392b"), ("top5", "#4878a8")):
        errors.plot([record["epoch"] for record in epochs], [record["val"][name] for record in epochs], "o-",
                    markersize=3, color=colour, label=f"validation, top-{name[3:]}, centre crop")
    errors.set(ylabel="error", ylim=(0, 1))
    if epochs:
        errors.legend(fontsize=8)
    rate.plot(at, [record["rate"] for record in steps])
    rate.set(ylabel="learning rate", xlabel="epoch", yscale="log")
    rate.yaxis.set_major_formatter("{x:g}")  # powers of ten would be formulas, which pictures here do not have
    rate.yaxis.set_minor_formatter(NullFormatter())
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawing
