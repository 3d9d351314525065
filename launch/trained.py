"""A run's newest checkpoint, loaded into this process's part of the network."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch import checkpoint, facts
from launch.errors import UserError
from launch.run_folder import Run, RunFolder
from launch.world import World
from model.network import AlexNet
from model.softmax import joined
from model.tower import whole_shapes
from pipeline.batches import views_of
from pipeline.loader import EvaluationLoader
from pipeline.manifest import Manifest
from pipeline.pixels.finish import Finisher
from pipeline.shards import ShardImages


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, and what it was trained with."""

    world: World
    folder: RunFolder
    run: Run
    checkpoint: Path
    mean: np.ndarray  # float32 [256, 256, 3]
    network: AlexNet

    @property
    def step(self) -> int:
        return checkpoint.read_state(self.checkpoint)["step"]

    def batches(self, images: ShardImages, views: int, batch: int) -> EvaluationLoader:
        recipe = self.run.recipe
        return EvaluationLoader(images, self.mean, views, batch, self.world.device, recipe.pixel_scale,
                                self.world.threads, recipe.mean_at, recipe.crop,
                                (self.world.replica, self.world.replicas))

    def pixels(self, images: np.ndarray, views: int) -> Tensor:
        """Return what the network sees of uint8 [N, 256, 256, 3]: float32 [N * views, 3, crop, crop], on its device."""
        recipe = self.run.recipe
        finisher = Finisher(self.mean, recipe.pixel_scale, recipe.crop, self.world.threads)
        crops = views_of(views, recipe.crop).of(np.arange(len(images)), recipe.mean_at)
        return finisher.finish(images, crops).permute(0, 3, 1, 2).to(self.world.device)

    @torch.no_grad()
    def last_hidden(self, pixels: Tensor) -> Tensor:
        """Return [N, F], what fc8 reads of both towers; the same in both processes."""
        return joined(self.network.hidden(pixels).float(), self.run.recipe.neurons[1], self.world.exchange)


def open_trained(world: World, path: Path, agreed: dict, shards: tuple[Path, Manifest, str] | None = None,
                 best: bool = False) -> Trained:
    """Load the newest checkpoint of the run in `path`, or the best; call `world.await_leader` before.

    The processes compare `agreed`, what else they were asked for. `shards` (a folder, its manifest and hash) are to
    have the classes of the run. Raises UserError where the run cannot be used, or the shards are others.
    """
    folder = RunFolder(path)
    run = folder.read()
    chosen = folder.best_checkpoint(run) if best else folder.last_checkpoint(run, tell=world.leads)
    if shards is not None:
        where, manifest, data = shards
        if [c.wnid for c in manifest.classes] != run.wnids:
            raise UserError(f"{where}: its {len(manifest.classes)} classes are not the {len(run.wnids)} that {path} "
                            "was trained on; give shards of the same classes")
        if data != run.data and world.leads:
            print(f"note: {where} are not the shards that {path} was trained on", file=sys.stderr)
        agreed = {**agreed, "data": data}
    mean = folder.mean(run)
    world.agree({"run": run.to_dict(), "checkpoint": chosen.name, "code": facts.code_hash(),
                 "precision": world.precision, **agreed})
    world.connect(run.recipe.towers)
    return Trained(world, folder, run, chosen, mean, load_network(chosen, run, world).eval())


def load_network(chosen: Path, run: Run, world: World) -> AlexNet:
    """Return this process's part of a checkpoint's network, on its device."""
    network = world.build(run.recipe, len(run.wnids), run.seed)
    checkpoint.load(chosen, {name: parameter.detach() for name, parameter in network.named_parameters()},
                    whole_shapes(run.recipe, len(run.wnids)), world.mesh)
    return network
