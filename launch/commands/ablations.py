"""The command that runs the matrix of ablations."""

from __future__ import annotations

from pathlib import Path

import click

from launch.commands.options import FOLDER, PLACE, cache_option, process_options


@click.command()
@click.argument("shards", type=PLACE)
@click.argument("out", type=FOLDER)
@click.option("--recipe", default="notes", show_default=True, help="What is changed: one of `alexnet recipes`.")
@click.option("--only", help="Some of the changes, with commas between them; default: all.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1, 1000), help="Runs of each, from seed 0.")
@click.option("--epochs", type=click.IntRange(1), help="Of every run, instead of the recipe's.")
@click.option("--processes", default="2", show_default=True, type=click.Choice(["1", "2"]), help="Of each run.")
@cache_option
@process_options
def ablate(shards: str, out: Path, recipe: str, only: str | None, seeds: int, epochs: int | None, processes: str,
           cache: Path | None, **process) -> None:
    """Train a recipe and its ablations on SHARDS; compare their errors in OUT/table.md and a picture.

    One run after the other, each under torchrun with two processes (one where the network has one tower). Stopped and
    started again it goes on where it was; with more --seeds or other --only it adds to what is there.
    """
    from launch.ablation.matrix import run_matrix
    from launch.choice import choose
    from launch.progress import shards_here

    choose(process["device"], process["transport"], process["precision"], int(processes))
    options = [word for name, value in process.items() if value is not None
               for word in (f"--{'timeout' if name == 'timeout_s' else name}", str(value))]
    chosen = [] if only is None else [name.strip() for name in only.split(",")]
    table = run_matrix(shards_here(shards, cache), out, recipe, epochs, chosen, seeds, int(processes), options)
    click.echo(table.read_text(), nl=False)
