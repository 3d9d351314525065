"""What the matrix found, beside what the paper says: a table (Markdown and JSON) and a picture (PNG and SVG)."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.errors import UserError
from launch.figures.drawing import figure, save
from model.ablations import ABLATIONS, Ablation
from pipeline.files import write_durably

BASE = "base"
CENTRE = Ablation("centre crop in place of ten views", "table of section 4.1's test, ILSVRC-2010: 39.0 / 18.3 against "
                  "37.5 / 17.0", 1.5, 1.3)


@dataclass(frozen=True)
class Outcome:
    """Errors of one run, shares 0-1, each (top-1, top-5)."""

    name: str
    seed: int
    ten_views: tuple[float, float]
    centre: tuple[float, float]
    images: int

    def __post_init__(self):
        if not all(len(pair) == 2 and all(0 <= share <= 1 for share in pair) for pair in (self.ten_views, self.centre)):
            raise ValueError("errors are shares")
        if not isinstance(self.name, str) or type(self.seed) is not int or type(self.images) is not int:
            raise ValueError("no name, seed and number of images")


@dataclass(frozen=True)
class Row:
    """The rise of error over the base with the same seed, in percentage points, over n seeds."""

    name: str
    what: str
    n: int
    top1: float
    top1_std: float | None  # of one run from the other seeds'; None of one alone
    top5: float
    top5_std: float | None
    paper_top1: float | None
    paper_top5: float | None
    paper_says: str


def outcomes(out: Path) -> list[Outcome]:
    """Return what the finished runs of a matrix came to; UserError where one is damaged."""
    found = []
    for path in sorted(out.glob("runs/*/errors.json")):
        try:
            found.append(Outcome(**json.loads(path.read_bytes())))
            if path.parent.name != f"{found[-1].name}-seed{found[-1].seed}":
                raise ValueError("of another run")
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path}: damaged; remove it, and the run is evaluated again") from None
    return found


def rows(found: list[Outcome]) -> list[Row]:
    """Compare each run with the base of its seed; runs whose base is not there yet are left out."""
    bases = {one.seed: one for one in found if one.name == BASE}
    made = []
    for name, ablation in ABLATIONS.items():
        pairs = [(one.ten_views, bases[one.seed].ten_views) for one in found if one.name == name and one.seed in bases]
        made += _row(name, ablation, pairs)
    return made + _row("centre", CENTRE, [(base.centre, base.ten_views) for base in bases.values()])


def _row(name: str, ablation: Ablation, pairs: list[tuple]) -> list[Row]:
    if not pairs:
        return []
    rises = [[100 * (changed[i] - base[i]) for changed, base in pairs] for i in (0, 1)]
    (top1, std1), (top5, std5) = ((statistics.mean(rise), statistics.stdev(rise) if len(rise) > 1 else None)
                                  for rise in rises)
    return [Row(name, ablation.what, len(pairs), top1, std1, top5, std5, ablation.paper_top1, ablation.paper_top5,
                ablation.paper_says)]


def write_table(out: Path) -> Path:
    """Write table.md, table.json, table.png and table.svg of what is there; return the first."""
    found = outcomes(out)
    matrix, table = json.loads((out / "matrix.json").read_bytes()), rows(found)
    bases = [one for one in found if one.name == BASE]
    write_durably(out / "table.json", (json.dumps({
        **matrix, "base": [asdict(one) for one in bases], "rows": [asdict(row) for row in table],
    }, indent=1) + "\n").encode())
    write_durably(out / "table.md", _markdown(matrix, bases, table).encode())
    _draw(matrix, table, out)
    return out / "table.md"


def _markdown(matrix: dict, bases: list[Outcome], table: list[Row]) -> str:
    top1, top5 = ([100 * base.ten_views[i] for base in bases] for i in (0, 1))
    lines = [
        f"Recipe `{matrix['recipe']}`, {matrix['epochs']} epochs, shards {matrix['data'][:12]}, "
        f"{bases[0].images} validation images, ten views. Base: top-1 error {_spread(top1)} %, top-5 {_spread(top5)} % "
        f"(n = {len(bases)}). Below: rise of the error against the base of the same seed, in percentage points; "
        "mean ± standard deviation over n seeds.", "",
        "| change | top-1 | top-5 | n | the paper: top-1 | top-5 | |", "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        lines.append(f"| {row.what} | {_signed(row.top1, row.top1_std)} | {_signed(row.top5, row.top5_std)} | {row.n} "
                     f"| {_signed(row.paper_top1)} | {_signed(row.paper_top5)} | {row.paper_says} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _signed(value: float | None, std: float | None = None) -> str:
    return "" if value is None else f"{value:+.1f}" + (f" ± {std:.1f}" if std is not None else "")


def _draw(matrix: dict, table: list[Row], out: Path) -> None:
    drawing = figure(8, 1.6 + 0.38 * len(table))
    axes = drawing.subplots()
    places = range(len(table))[::-1]
    axes.barh(places, [row.top1 for row in table], height=0.6,
              xerr=[math.nan if row.top1_std is None else row.top1_std for row in table],
              color="#4878a8", error_kw={"elinewidth": 1, "capsize": 3}, label="here (mean, standard deviation)")
    published = [(row.paper_top1, place) for row, place in zip(table, places) if row.paper_top1 is not None]
    axes.plot(*zip(*published), "D", color="#d1603d", label="the paper, on ImageNet") if published else None
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{row.what} (n = {row.n})" for row in table])
    axes.set_xlabel("rise of the top-1 error, ten views, in percentage points")
    axes.set_title(f"{matrix['recipe']}, {matrix['epochs']} epochs", fontsize=10)
    drawing.legend(fontsize=8, loc="outside lower center", ncols=2)
    save(drawing, out / "table")
