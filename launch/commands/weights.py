"""Commands that bring weights in and out: export, import."""

from __future__ import annotations

from pathlib import Path

import click

from launch.commands.options import FOLDER, PLACE, best_option, cache_option


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("file", type=FOLDER)
@best_option
def export(run: Path, file: Path, best: bool) -> None:
    """Write RUN's newest checkpoint (or the best), the whole network, to FILE, whose ending says as what.

    .safetensors and .pt (a plain state_dict): the weights, and the mean image. .onnx: a network that takes any number
    of images. .py: a module that loads the first two and needs nothing of this project.
    """
    from launch.weights.exporting import export

    step = export(run, file, best)
    click.echo(f"{file}: of step {step:,}, {file.stat().st_size:,} bytes", err=True)


@click.command("import")
@click.argument("file", type=FOLDER)
@click.argument("run", type=FOLDER)
@click.option("--recipe", help="What a file is that does not say it (.pt): one of `alexnet recipes`.")
@click.option("--ablation", help="The change to it, if any: one of those of `alexnet ablate`.")
@click.option("--shards", type=PLACE, help="Whose classes and mean image are the network's.")
@click.option("--classes", type=FOLDER, help="A file with a line for each class: wnid and words (synset_words.txt).")
@click.option("--mean", type=FOLDER, help="The mean image: .npy, or Caffe's .binaryproto.")
@cache_option
def import_(file: Path, run: Path, recipe: str | None, ablation: str | None, shards: str | None, classes: Path | None,
            mean: Path | None, cache: Path | None) -> None:
    """Make a run, RUN, of the weights in FILE: to evaluate, predict and export as any other.

    FILE is an export (.safetensors, .pt, .onnx) or Caffe's bvlc_alexnet.caffemodel.
    """
    from launch.errors import UserError
    from launch.progress import shards_here
    from launch.weights.importing import Given, import_weights
    from model.ablations import ablated
    from model.recipe import recipe_named

    chosen = None if recipe is None else recipe_named(recipe)
    if ablation is not None:
        if chosen is None:
            raise UserError("--ablation changes a recipe: name it with --recipe")
        chosen = ablated(chosen, ablation)
    here = None if shards is None else shards_here(shards, cache)
    bundle = import_weights(file, run, Given(chosen, here, classes, mean))
    click.echo(f"{run}: {bundle.recipe.name}, {len(bundle.wnids)} classes, step {bundle.step}", err=True)
