"""Loss, errors and learning rate over a run's epochs."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from launch.figures.drawing import figure
from launch.runlog import of_the_run


def draw_curves(records: list[dict]) -> Figure:
    """Draw the records of a log (launch.runlog.read_log)."""
    steps, epochs = of_the_run(records, "steps"), of_the_run(records, "epoch")
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
