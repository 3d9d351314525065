"""Collects what a run left and fills the page in."""

from __future__ import annotations

import base64
import io
import json
import statistics
from pathlib import Path

import jinja2
import matplotlib

from launch.errors import UserError
from launch.figures.curves import draw_curves
from launch.recipe_text import shown
from launch.report.published import PUBLISHED
from launch.run_folder import Run, RunFolder
from launch.runlog import NOT_OURS, odd_line, of_the_run, read_log
from model.recipe import PAPER, meanings
from pipeline.errors import DataError
from pipeline.files import write_durably
from pipeline.manifest import FILE_NAME, parse_manifest

FIGURES = {
    "kernels": "The first layer's kernels, tower by tower (figure 3 of the paper); colour selectivity is the share of "
               "a kernel's energy that a grey picture cannot reach.",
    "guesses": "Validation pictures with the five likeliest classes. Titles: what the picture shows, green where the "
               "first guess is right. The right class has a green bar.",
    "neighbours": "Left: validation pictures. Right of them: the training pictures nearest to them by the last hidden "
                  "layer, with their distance; green where the class is the same.",
}
TOLD_ELSEWHERE = ("event", "recipe", "wnids", "seed", "mean", "data")
OF_EACH_START = ("time", "step", "repeats", "validates", "job")


def write_report(path: Path, out: Path) -> None:
    """Write the page of the run in `path` to `out`. UserError where there is no run, or no log of it."""
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"{out}: a report is a page: name a file that ends in .html")
    folder = RunFolder(path)
    run = folder.read()
    if not folder.log_path.is_file():
        raise UserError(f"{folder.log_path}: missing, and a report is made of it")
    records = read_log(folder.log_path)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = lambda share: f"{100 * share:.2f} %"
    data = _data(folder, run)
    try:
        page = environment.get_template("page.html.j2").render(
            name=path.resolve().name, run=run, recipe=_recipe_rows(run), published=PUBLISHED, data=data,
            evaluations=_evaluations(records), epochs=of_the_run(records, "epoch"), speed=_speed(records),
            environments=_environments(records), restarts=_restarts(records),
            failures=[record for record in records if record["event"] == "failed"],
            curves=_curves(records), figures=list(_figures(path / "figures")))
    except (jinja2.UndefinedError, *NOT_OURS) as error:
        raise UserError(odd_line(folder.log_path, error)) from None
    write_durably(out, page.encode(errors="backslashreplace"))


def _recipe_rows(run: Run) -> list[tuple[str, str, str, bool, str]]:
    """(field, value, the paper's, whether they differ, meaning)."""
    mine, papers = run.recipe.to_dict(), PAPER.to_dict()
    return [(name, shown(mine[name]), shown(papers[name]), mine[name] != papers[name], meaning)
            for name, meaning in meanings().items()]


def _data(folder: RunFolder, run: Run) -> dict | None:
    """What the manifest says that the run keeps; None where it keeps none."""
    path = folder.path / FILE_NAME
    if not path.is_file():
        return None
    try:
        manifest = parse_manifest(path.read_bytes(), str(path))
    except DataError as error:
        raise UserError(str(error)) from None
    splits = [(name, split.images, split.rejected, min(split.class_counts), max(split.class_counts), split.files)
              for name, split in manifest.splits.items()]
    return {"splits": splits, "layout": manifest.layout, "encoding": manifest.encoding, "sha256": run.data}


def _evaluations(records: list[dict]) -> list[dict]:
    """The last one of each kind: split, views, step and precision, which earlier versions did not write down."""
    found = [{"precision": None, **record} for record in records if record["event"] == "evaluation"]
    return list({tuple(one[key] for key in ("split", "views", "step", "data", "precision")): one
                 for one in found}.values())


def _environments(records: list[dict]) -> list[dict]:
    """What was so at the start, and at later ones what had changed, where anything had."""
    found, known = [], {}
    for record in records:
        if record["event"] in ("start", "resume", "import"):
            fields = {key: value for key, value in record.items() if key not in TOLD_ELSEWHERE}
            changed = {key: value for key, value in fields.items()
                       if key not in OF_EACH_START and known.get(key, key) != value}
            known |= changed
            if changed:
                found.append({"time": record["time"], "step": record["step"]} | changed)
    return found


def _restarts(records: list[dict]) -> dict | None:
    """How often the run was gone on with, and the steps that were done twice for it."""
    resumed = [record for record in records if record["event"] == "resume"]
    return {"times": len(resumed), "repeated": sum(record.get("repeats", 0) for record in resumed)} if resumed else None


def _speed(records: list[dict]) -> dict | None:
    steps = of_the_run(records, "steps")
    if not steps:
        return None
    rates = [record["images_per_s"] for record in steps]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates),
            **{name: statistics.median(record[name] for record in steps)
               for name in ("waiting_for_data", "waiting_for_peer")}}


def _curves(records: list[dict]) -> str | None:
    if not of_the_run(records, "steps"):
        return None
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "alexnet"}):
        draw_curves(records).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _embedded(file.getvalue(), "image/svg+xml")


def _figures(folder: Path):
    """Yield (name, caption, picture, its checkpoint) of those that `alexnet figures` has drawn."""
    try:
        checkpoint = json.loads((folder / "figures.json").read_bytes())["checkpoint"]
    except (OSError, *NOT_OURS):
        return
    for name, caption in FIGURES.items():
        path = folder / f"{name}.png"
        if path.is_file():
            yield name, caption, _embedded(path.read_bytes(), "image/png"), checkpoint


def _embedded(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
