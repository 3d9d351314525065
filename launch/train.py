"""Begins a training, or goes on with one: what must be so before the first step. The same program in every process."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from launch import checkpoint, facts
from launch.environment import job, restarts, tell_checkpoint
from launch.errors import OutOfMemory, UserError
from launch.evaluate import Errors
from launch.run_folder import IN_USE, Run, RunFolder
from launch.shard_check import check_shards
from launch.trainer import Options, Trainer
from launch.world import World
from model.recipe import Recipe
from pipeline.manifest import FILE_NAME, load_manifest


def train(world: World, shards: Path, folder: RunFolder, recipe: Recipe | None, seed: int | None,
          epochs: int | None, options: Options) -> Errors | None:
    """Train in `folder` on `shards`, in as many processes as there are; return the last validation's errors.

    With `options.resume` recipe, seed and epochs come from the run; those given must not differ. A torchrun job that
    starts its processes again goes on with the run that it began. Raises UserError, DataError, RecipeError (the user's
    to mend), PeerError, RunFailed, Stopped.
    """
    world.await_leader()
    # A job without a name of its own cannot tell whose run is there, and takes it for the one that it began.
    restarted = folder.begun_by(job()) if job() else restarts() > 0 and folder.is_there()
    manifest, data = load_manifest(shards)
    hashed: dict[str, list[int]] = {}
    if world.leads:
        known = None if not options.check_hashes else folder.hashed() if restarted else {}
        hashed = check_shards(shards, manifest, known)
    seen = checkpoint.steps(folder.checkpoints)
    if options.resume or restarted:
        run = _resumed(folder, recipe, seed, epochs, data)
        newest = folder.newest_checkpoint(run, tell=world.leads)
        reached = checkpoint.read_state(newest)["step"] if newest else 0
        if newest:
            tell_checkpoint()
        if options.stop_after is not None and options.stop_after < reached:
            raise UserError(f"{folder.path}: at step {reached} already, past --steps {options.stop_after}")
    else:
        recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
        wnids, words = zip(*((c.wnid, c.words) for c in manifest.classes))
        run, newest = Run(recipe, seed, list(wnids), list(words), data, manifest.mean.sha256), None
        if world.leads:
            if folder.in_use():
                raise UserError(f"{folder.path}: {IN_USE}")
            folder.check_new()
    if run.recipe.batch % world.replicas:
        raise UserError(f"a batch of {run.recipe.batch} images is not to be divided among {world.replicas} replicas: "
                        "start another number of processes, or give another --batch")
    trainer = Trainer(world, shards, manifest, run, folder, options)
    world.agree({"recipe": run.recipe.to_dict(), "seed": run.seed, "data": data, "code": facts.code_hash(),
                 "torch": torch.__version__, "transport": world.transport, "precision": world.precision,
                 "whole": world.whole, "stop_after": options.stop_after, "start": newest.name if newest else None})
    world.connect(run.recipe.towers)
    with folder.held() if world.leads else nullcontext():
        if world.leads:
            if checkpoint.steps(folder.checkpoints) != seen:
                raise UserError(f"{folder.path}: another process has trained there meanwhile; resume again")
            if not (options.resume or restarted):
                folder.check_new()
                folder.create(run, (shards / manifest.mean.name).read_bytes(), (shards / FILE_NAME).read_bytes(), job())
            for damaged in seen[seen.index(newest) + 1 if newest else 0 :]:
                checkpoint.set_aside(damaged)
            if hashed:
                folder.write_hashed(hashed)
        try:
            return trainer.run(newest)
        except torch.OutOfMemoryError:
            raise OutOfMemory(f"{world.device}: out of memory with recipe {run.recipe.name} and a batch of "
                              f"{run.recipe.batch}; free the device or use a larger one") from None


def _resumed(folder: RunFolder, recipe: Recipe | None, seed: int | None, epochs: int | None, data: str) -> Run:
    run = folder.read()
    if recipe is not None and replace(recipe, epochs=run.recipe.epochs) != run.recipe:
        wanted = {**recipe.to_dict(), "epochs": run.recipe.epochs}
        differing = [name for name, value in run.recipe.to_dict().items() if wanted[name] != value]
        raise UserError(f"{folder.path}: a run of recipe {run.recipe.name}, not {recipe.name} as asked for "
                        f"({', '.join(differing)} differ); resume without --recipe, --ablation and --batch, or train "
                        "in another folder")
    if seed is not None and seed != run.seed or epochs is not None and epochs != run.recipe.epochs:
        raise UserError(f"{folder.path}: a run with seed {run.seed} and {run.recipe.epochs} epochs; "
                        "resume without --seed and --epochs, or train in another folder")
    if data != run.data:
        raise UserError(f"{folder.path}: trained on other shards (manifest {run.data[:12]}, these have {data[:12]}); "
                        "resume with those")
    return run
