"""A trained network apart from any run or file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch import checkpoint
from launch.checkpoint_writer import save
from launch.errors import UserError
from launch.run_folder import Run, RunFolder
from launch.runlog import RunLog
from model.recipe import Recipe
from model.schedule import Progress
from model.tower import whole_shapes
from pipeline.files import TEMPORARY, sha256_of
from pipeline.manifest import IMAGE_SIZE

FORMAT = "alexnet-two-towers 1"


@dataclass(frozen=True)
class Bundle:
    """The whole network's parameters by name, and what is to be known to use them."""

    tensors: dict[str, Tensor]  # float32, on the CPU
    mean: np.ndarray  # float32 [256, 256, 3]
    recipe: Recipe
    wnids: list[str]
    words: list[str]
    seed: int = 0
    step: int = 0
    data: str = ""  # SHA-256 of the manifest of the shards; "": not known

    def describe(self) -> str:
        """Return all but the numbers, as JSON; `from_description` takes it back."""
        return json.dumps({"format": FORMAT, "recipe": self.recipe.to_dict(), "wnids": self.wnids, "words": self.words,
                           "seed": self.seed, "step": self.step, "data": self.data})

    @staticmethod
    def from_description(text: str, tensors: dict[str, Tensor], mean: np.ndarray, where: Path) -> Bundle:
        """UserError where `text` is no description of this format."""
        try:
            facts = json.loads(text)
            if facts.pop("format") != FORMAT:
                raise ValueError("another format")
            bundle = Bundle(tensors, mean, Recipe.from_dict(facts.pop("recipe")), **facts)
            Run(bundle.recipe, bundle.seed, bundle.wnids, bundle.words, bundle.data, "")  # ValueError for other types
            if type(bundle.step) is not int or not 0 <= bundle.step < 10**9:
                raise ValueError("its step is no number of steps")
            if type(bundle.wnids) is not list or type(bundle.words) is not list:
                raise ValueError("its classes are no lists")
            return bundle
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{where}: what it says of itself is damaged ({error}); export it anew") from None

    def check(self, where: Path) -> None:
        """UserError where the numbers are not those of such a network."""
        if not self.wnids or len(set(self.wnids)) != len(self.wnids):
            raise UserError(f"{where}: names no classes, or one of them twice")
        shapes = whole_shapes(self.recipe, len(self.wnids))
        if missing := sorted(shapes.keys() - self.tensors.keys()):
            raise UserError(f"{where}: lacks {missing[0]}; it is no network of recipe {self.recipe.name}")
        for name, shape in shapes.items():
            if self.tensors[name].shape != shape:
                raise UserError(f"{where}: {name} is {list(self.tensors[name].shape)}, and {list(shape)} with recipe "
                                f"{self.recipe.name} and {len(self.wnids)} classes; name the right ones")
            if not torch.isfinite(self.tensors[name]).all():
                raise UserError(f"{where}: {name} holds numbers that are not finite")
        if extra := sorted(self.tensors.keys() - shapes.keys()):
            raise UserError(f"{where}: holds {extra[0]}, which no network of recipe {self.recipe.name} has")
        if self.mean.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or not np.isfinite(self.mean).all():
            raise UserError(f"{where}: its mean image is not {[IMAGE_SIZE, IMAGE_SIZE, 3]} finite numbers")


def bundle_of_run(path: Path, best: bool = False) -> Bundle:
    """Return the newest checkpoint of a run, or the best. UserError where there is none."""
    folder = RunFolder(path)
    run = folder.read()
    chosen = folder.best_checkpoint(run) if best else folder.last_checkpoint(run)
    shapes = whole_shapes(run.recipe, len(run.wnids))
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    checkpoint.load(chosen, tensors, shapes)
    return Bundle(tensors, folder.mean(run), run.recipe, run.wnids, run.words, run.seed,
                  checkpoint.read_state(chosen)["step"], run.data)


def write_run(bundle: Bundle, path: Path, source: Path) -> None:
    """Make a run of `bundle`, read from the file `source`: evaluation, predictions and figures take it as any other.

    Training can go on from it, with velocities of 0. Raises UserError where `path` holds something, or the bundle is
    not what it says.
    """
    bundle.check(source)
    mean = io.BytesIO()
    np.save(mean, np.ascontiguousarray(bundle.mean, np.float32))
    RunFolder(path).check_new()
    digest = hashlib.sha256(mean.getvalue()).hexdigest()
    run = Run(bundle.recipe, bundle.seed, bundle.wnids, bundle.words, bundle.data, digest)
    shapes = whole_shapes(bundle.recipe, len(bundle.wnids))
    velocities = {f"velocity.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    state = {"progress": asdict(Progress()), "trained_s": 0.0, **run.to_dict()}
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")  # whole under its name, or not at all
    folder = RunFolder(temporary)
    try:
        folder.create(run, mean.getvalue())
        save(folder.checkpoints, bundle.step, bundle.tensors | velocities,
             shapes | {f"velocity.{name}": shape for name, shape in shapes.items()}, state)
        with RunLog(folder.log_path) as log:
            log.write("import", source=str(source), sha256=sha256_of(source), step=bundle.step, **run.to_dict())
        if path.exists():
            shutil.rmtree(path)  # what a kill at the start of a run left
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
