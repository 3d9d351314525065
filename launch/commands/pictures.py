"""Commands that show pictures to a trained network: predict, similar, figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from launch.commands.options import FOLDER, PLACE, cache_option, process_options

IMAGES = click.argument("image", type=FOLDER, nargs=-1, required=True)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object an image on stdout.")


@click.command()
@click.argument("run", type=FOLDER)
@IMAGES
@click.option("--views", default="10", show_default=True, type=click.Choice(["1", "10"]),
              help="Centre crop alone, or four corners and centre with their mirror images.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Guesses an image.")
@JSON
@process_options
def predict(run: Path, image: tuple[Path, ...], views: str, top: int, as_json: bool, **process) -> None:
    """Say what RUN's newest checkpoint sees in each IMAGE, a picture file of any kind.

    Alone or under torchrun, like train. Files that are no picture are named and left out; then the exit code is 2.
    """
    from launch.predict import predict
    from launch.world import join_world

    broken: list[Path] = []
    with join_world(**process) as world:
        for path, guesses in predict(world, run, image, int(views), top, _leave_out(broken, world.leads)):
            lines = [f"{guess.probability:6.1%}  {guess.wnid}  {guess.words}" for guess in guesses]
            _show(world.leads, path, "guesses", guesses, lines, as_json)
    if broken:
        click.get_current_context().exit(2)


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("shards", type=PLACE)
@IMAGES
@click.option("--top", default=6, show_default=True, type=click.IntRange(1), help="Training images an image.")
@JSON
@cache_option
@process_options
def similar(run: Path, shards: str, image: tuple[Path, ...], top: int, as_json: bool, cache: Path | None,
            **process) -> None:
    """Name the training images of SHARDS that are most like each IMAGE to RUN's newest checkpoint.

    By the Euclidean distance between outputs of the last hidden layer (fc7, of the central crop). Those of all training
    images are worked out once and kept in RUN/similar, two bytes a number: 8 kB an image at full width. Alone or under
    torchrun, like train.
    """
    from launch.progress import TaskBars, shards_here
    from launch.similar import similar
    from launch.world import join_world

    broken: list[Path] = []
    with join_world(**process) as world, TaskBars(world.leads) as progress:
        here = shards_here(shards, cache)
        for path, found in similar(world, run, here, image, top, _leave_out(broken, world.leads), progress):
            lines = [f"{one.distance:8.3f}  {one.name}  {one.wnid}  {one.words}" for one in found]
            _show(world.leads, path, "similar", found, lines, as_json)
    if broken:
        click.get_current_context().exit(2)


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("shards", type=PLACE)
@click.option("--pictures", default=8, show_default=True, type=click.IntRange(1, 100), help="Validation images shown.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Which ones.")
@cache_option
@process_options
def figures(run: Path, shards: str, pictures: int, seed: int, cache: Path | None, **process) -> None:
    """Draw the paper's figures 3 and 4 and the curves of RUN, to RUN/figures (PNG and SVG).

    The first layer's kernels, tower by tower; validation images of SHARDS with five guesses each; the training images
    most like them; loss, errors and learning rate. Alone or under torchrun, like train.
    """
    from launch.figures.make import make_figures
    from launch.progress import TaskBars, shards_here
    from launch.world import join_world

    with join_world(**process) as world, TaskBars(world.leads) as progress:
        folder = make_figures(world, run, shards_here(shards, cache), pictures, seed, progress)
    if world.leads:
        found = json.loads((folder / "figures.json").read_text())["colour_selectivity"]
        numbers = ", ".join(f"tower {n} {value:.3f}" for n, value in enumerate(found))
        click.echo(f"{folder}: kernels, guesses, neighbours, curves; colour selectivity: {numbers}")


def _leave_out(broken: list[Path], told: bool) -> Callable[[Path, str], None]:
    def leave_out(path: Path, reason: str) -> None:
        broken.append(path)
        if told:
            click.echo(" ".join(f"alexnet: {path}: {reason}; left out".splitlines()), err=True)

    return leave_out


def _show(leads: bool, path: Path, what: str, found: list, lines: list[str], as_json: bool) -> None:
    if leads and as_json:
        click.echo(json.dumps({"image": str(path), what: [asdict(one) for one in found]}))
    elif leads:
        click.echo("\n".join([str(path), *(f"  {line}".rstrip() for line in lines)]))
