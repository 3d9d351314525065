"""Commands that measure speed."""

from __future__ import annotations

import json
from pathlib import Path

import click

from launch.commands.options import FOLDER, process_options

PEERS = click.option("--peers/--no-peers", default=True, help="Measure in turn with what others use.")


@click.group()
def bench() -> None:
    """Measure speed; prints JSON."""


@bench.command("preprocess")
@click.argument("images", type=FOLDER)
@click.option("--total", default=8000, show_default=True, type=click.IntRange(1), help="Images to pack, repeated.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes; default: one a core.")
@click.option("--store", default="jpeg", show_default=True, type=click.Choice(["jpeg", "raw"]))
@PEERS
def bench_preprocess(images: Path, **settings) -> None:
    """Pack the image files below the folder IMAGES."""
    from launch.bench.preprocess import preprocess_speed

    click.echo(json.dumps(preprocess_speed(images, **settings)))


@bench.command("loader")
@click.argument("shards", type=FOLDER)
@click.option("--batch", default=128, show_default=True, type=click.IntRange(1))
@click.option("--batches", default=20, show_default=True, type=click.IntRange(1), help="A repeat.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="Of DALI; default: one a core.")
@PEERS
def bench_loader(shards: Path, **settings) -> None:
    """Deliver training batches from SHARDS, and do nothing with them."""
    from launch.bench.loader import loader_speed

    click.echo(json.dumps(loader_speed(shards, **settings)))


@bench.command("step")
@click.option("--recipe", default="notes", show_default=True)
@click.option("--ablation", help="One change to the recipe: one of those of `alexnet ablate`, as no-lrn.")
@click.option("--classes", default=1000, show_default=True, type=click.IntRange(2))
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1), help="Measured, after two others.")
@PEERS
@process_options
def bench_step(recipe: str, ablation: str | None, classes: int, steps: int, peers: bool, **process) -> None:
    """Training steps on made-up images; alone, or under torchrun with two processes."""
    from launch.bench.step import step_speed
    from launch.world import join_world
    from model.ablations import ablated
    from model.recipe import recipe_named

    chosen = recipe_named(recipe)
    if ablation is not None:
        chosen = ablated(chosen, ablation)
    with join_world(**process) as world:
        found = step_speed(world, chosen, classes, steps, peers)
    if world.leads:
        click.echo(json.dumps(found | {"ablation": ablation}))
