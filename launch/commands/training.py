"""Commands that train and evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import click

from launch.commands.options import (
    FOLDER,
    PLACE,
    Number,
    best_option,
    cache_option,
    graphs_option,
    process_options,
    whole_option,
)


@click.command()
@click.argument("shards", type=PLACE)
@click.argument("run", type=FOLDER)
@click.option("--recipe", help="One of `alexnet recipes`; default notes.")
@click.option("--ablation", help="One change to the recipe: one of those of `alexnet ablate`.")
@click.option("--seed", type=click.IntRange(0), help="Of weights, batches and dropout; default 0.")
@click.option("--epochs", type=click.IntRange(1), help="Instead of the recipe's.")
@click.option("--steps", type=click.IntRange(1), help="Stop after so many steps in all, with a checkpoint.")
@click.option("--resume", is_flag=True, help="Go on from RUN's newest checkpoint.")
@click.option("--checkpoint-minutes", default=15.0, show_default=True, type=Number(0, 1e6),
              help="Besides one after every epoch.")
@click.option("--keep", default=3, show_default=True, type=click.IntRange(1),
              help="Checkpoints kept, the newest; the best one too.")
@click.option("--check/--no-check", default=True, help="Hash all shards before the start.")
@click.option("--batch", type=click.IntRange(1, 1 << 20),
              help="Images a step, of all replicas together, instead of the recipe's.")
@click.option("--rate-rule", type=click.Choice(["none", "linear", "sqrt"]),
              help="How --batch changes the learning rate; default: none, the recipe's stays.")
@click.option("--warmup-epochs", type=Number(0, 1e6),
              help="Epochs in which the rate rises from the recipe's to that of --rate-rule; default: none.")
@click.option("--profile", is_flag=True,
              help="Write a trace of five steps after six others, RUN/trace-tower0.json (and 1), for Perfetto.")
@cache_option
@graphs_option
@whole_option
@process_options
def train(shards: str, run: Path, recipe: str | None, ablation: str | None, seed: int | None, epochs: int | None,
          steps: int | None, resume: bool, checkpoint_minutes: float, keep: int, check: bool, batch: int | None,
          rate_rule: str | None, warmup_epochs: float | None, profile: bool, cache: Path | None, **process) -> None:
    """Train on SHARDS, a folder or a place in an object store; log and checkpoints go to RUN.

    Alone, one process trains the whole network. Under `python -m launch.torchrun --nproc-per-node=2` each process
    trains one tower, with 4, 6, ... processes there are replicas of the pair: see launch/train.sh.

    SIGTERM ends a run with a checkpoint, and exit code 75.
    """
    from launch.progress import shards_here
    from launch.run_folder import RunFolder
    from launch.train import train
    from launch.trainer import Options
    from launch.world import join_world
    from model.ablations import ablated
    from model.batch_rule import with_batch
    from model.recipe import recipe_named

    if recipe is None and (not resume or ablation or batch):
        recipe = "notes"
    chosen = None if recipe is None else recipe_named(recipe)
    if ablation is not None:
        chosen = ablated(chosen, ablation)
    if batch is None and (rate_rule or warmup_epochs is not None):
        raise click.UsageError("--rate-rule and --warmup-epochs go with --batch.")
    if batch is not None:
        chosen = with_batch(chosen, batch, rate_rule or "none", warmup_epochs or 0.0)
    options = Options(resume, steps, checkpoint_minutes, keep, check, profile)
    with join_world(**process, replicas=True) as world:
        folder = RunFolder(run)
        errors = train(world, shards_here(shards, cache), folder, chosen, seed if resume else seed or 0, epochs,
                       options)
    if world.leads:
        last = f"last validation's top-1 error {errors.top1:.2%}, top-5 {errors.top5:.2%}; " if errors else ""
        click.echo(f"{run}: {last}log {folder.log_path}, checkpoints {folder.checkpoints}", err=True)


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("shards", type=PLACE)
@click.option("--split", default="val", show_default=True, type=click.Choice(["train", "val", "test"]),
              help="Which images; ILSVRC-2010 has a test set with labels.")
@click.option("--views", default="10", show_default=True, type=click.Choice(["1", "10"]),
              help="Centre crop alone, or four corners and centre with their mirror images.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1, 4096), help="Images at a time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@best_option
@cache_option
@whole_option
@process_options
def evaluate(run: Path, shards: str, split: str, views: str, batch: int, as_json: bool, best: bool,
             cache: Path | None, **process) -> None:
    """Print top-1 and top-5 error of RUN.

    Of its newest checkpoint (or the best), over the validation images (or those of --split) of SHARDS, a folder or a
    place in an object store; alone or under torchrun, like train.
    """
    from launch.evaluate import evaluate_run
    from launch.progress import shards_here
    from launch.world import join_world

    with join_world(**process, replicas=True) as world:
        found, step = evaluate_run(world, run, shards_here(shards, cache), split, int(views), batch, best)
    if not world.leads:
        return
    if as_json:
        click.echo(json.dumps({"run": str(run), "step": step, "split": split, "views": int(views),
                               "precision": world.precision, "images": found.images, "top1_error": found.top1,
                               "top5_error": found.top5}))
    else:
        click.echo(f"top-1 error {found.top1:.2%}, top-5 error {found.top5:.2%} "
                   f"({found.images} {split} images, {views} view{'s' if views != '1' else ''}, step {step}, "
                   f"{world.precision})")
