"""Training: the loop, what it writes, and when it stops. The same program in every process."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from launch import checkpoint, facts
from launch.errors import RunFailed, UserError
from launch.evaluate import Errors, error_rates
from launch.profiling import profiled
from launch.progress import check_with_bar
from launch.run_folder import IN_USE, Run, RunFolder
from launch.runlog import Interval, RunLog
from launch.world import World
from model.optimizer import optimizer_of, set_rates
from model.recipe import Recipe
from model.schedule import Moment, Progress
from model.softmax import first_class
from model.tower import whole_shapes
from model.training import TrainingStep
from pipeline.batches import Lighting, TrainingBatches
from pipeline.loader import EvaluationLoader, TrainingLoader
from pipeline.manifest import FILE_NAME, Manifest, load_manifest
from pipeline.shards import ShardImages

CONTROL_STEPS = 10  # how often the towers compare batches, look at the loss and may write a checkpoint


@dataclass(frozen=True)
class Options:
    """How to run; what is learned does not depend on these."""

    resume: bool = False
    stop_after: int | None = None  # steps in all; None: to the recipe's end
    checkpoint_minutes: float = 15.0
    keep: int = 3  # checkpoints
    check_hashes: bool = True  # of all shards, before the start
    profile: bool = False  # write a trace of a few steps


def train(world: World, shards: Path, folder: RunFolder, recipe: Recipe | None, seed: int | None,
          epochs: int | None, options: Options) -> Errors | None:
    """Train in `folder` on `shards`, one process or two; return the last validation's errors.

    With `options.resume` recipe, seed and epochs come from the run; those given must not differ.
    Raises UserError, DataError, RecipeError (the user's to mend), PeerError, RunFailed (NaN).
    """
    world.await_leader()
    manifest, data = load_manifest(shards)
    if world.leads:
        check_with_bar(shards, manifest, options.check_hashes)
    if options.resume:
        run = _resumed(folder, recipe, seed, epochs, data)
        newest = folder.newest_checkpoint(run)
        reached = checkpoint.read_state(newest)["step"] if newest else 0
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
    trainer = Trainer(world, shards, manifest, run, folder, options)
    world.agree({"recipe": run.recipe.to_dict(), "seed": run.seed, "data": data, "code": facts.code_hash(),
                 "torch": torch.__version__, "transport": world.transport, "precision": world.precision,
                 "stop_after": options.stop_after, "start": newest.name if newest else None})
    world.connect(run.recipe.towers)
    with folder.held() if world.leads else nullcontext():
        if world.leads and options.resume and folder.newest_checkpoint(run) != newest:
            raise UserError(f"{folder.path}: another process has trained there meanwhile; resume again")
        if world.leads and not options.resume:
            folder.check_new()
            folder.create(run, (shards / manifest.mean.name).read_bytes(), (shards / FILE_NAME).read_bytes())
        try:
            return trainer.run(newest)
        except torch.OutOfMemoryError:
            raise RunFailed(f"{world.device}: out of memory with recipe {run.recipe.name} and a batch of "
                            f"{run.recipe.batch}; free the device or use a larger one") from None


def _resumed(folder: RunFolder, recipe: Recipe | None, seed: int | None, epochs: int | None, data: str) -> Run:
    run = folder.read()
    if recipe is not None and replace(recipe, epochs=run.recipe.epochs) != run.recipe:
        raise UserError(f"{folder.path}: a run of recipe {run.recipe.name}, not {recipe.name} as it is now; "
                        "resume without --recipe, or train in another folder")
    if seed is not None and seed != run.seed or epochs is not None and epochs != run.recipe.epochs:
        raise UserError(f"{folder.path}: a run with seed {run.seed} and {run.recipe.epochs} epochs; "
                        "resume without --seed and --epochs, or train in another folder")
    if data != run.data:
        raise UserError(f"{folder.path}: trained on other shards (manifest {run.data[:12]}, these have {data[:12]}); "
                        "resume with those")
    return run


class Trainer:
    """One process's part of a run: its network, its data, its log."""

    def __init__(self, world: World, shards: Path, manifest: Manifest, run: Run, folder: RunFolder,
                 options: Options):
        self.world, self.identity, self.folder, self.options = world, run, folder, options
        self.recipe = run.recipe
        self.mean = np.load(shards / manifest.mean.name, allow_pickle=False)
        self.classes = len(manifest.classes)
        self.training, self.validation = (ShardImages(shards, manifest, split) for split in ("train", "val"))
        recipe = self.recipe
        lighting = Lighting.from_covariance(np.array(manifest.rgb_covariance), recipe.colour_std, recipe.colour_by)
        self.batches = TrainingBatches(len(self.training), recipe.batch, run.seed, lighting, recipe.colour_epochs,
                                       recipe.crops_and_flips, recipe.crops_shared_by, recipe.mean_at, recipe.crop)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = self.recipe.epochs * self.steps_per_epoch
        self.progress = Progress()
        self.trained_s = 0.0  # without validation and checkpoints, earlier parts of a resumed run included

    def run(self, newest: Path | None) -> Errors | None:
        """Train from `newest`, or from the start."""
        self._build(newest)
        if newest is not None and self.world.leads:
            print(f"going on from step {self.step} of {self.total_steps}", file=sys.stderr)
        with RunLog(self.folder.log_path if self.world.leads else None) as self.log:
            self._log_start(newest)
            return self._loop()

    def _loop(self) -> Errors | None:
        stop = min(self.total_steps, self.options.stop_after or self.total_steps)
        errors, saved_at = None, time.monotonic()
        images = TrainingLoader(self.training, self.mean, self.batches, self.world.device, self.recipe.pixel_scale,
                                self.world.threads, self.step, self.world.pictures)
        bar = tqdm(total=stop, initial=self.step, unit="step", disable=None if self.world.leads else True,
                   dynamic_ncols=True)
        trace = self.folder.trace_path(self.world.rank) if self.options.profile else None
        with images, bar, profiled(trace) as end_step:
            interval = Interval(images, self.world.exchange)
            while self.step < stop and not self.recipe.schedule.ended(self.progress):
                with record_function("wait for data"):
                    pixels, labels = next(images)
                interval.add(*self._step(pixels, labels), len(labels))
                end_step()
                self.step += 1
                bar.update()
                ends_epoch = self.step % self.steps_per_epoch == 0
                if not (self.step % CONTROL_STEPS == 1 or ends_epoch or self.step == stop):
                    continue
                due = ends_epoch or self.step == stop or (
                    time.monotonic() - saved_at > 60 * self.options.checkpoint_minutes)
                due = self._control(pixels, labels, due, interval)
                self._log_interval(interval, bar)
                if ends_epoch:
                    errors = self._validate()
                if due:
                    self._save()
                    saved_at = time.monotonic()
                interval = Interval(images, self.world.exchange)
        self.log.write("end", step=self.step, trained_s=round(self.trained_s, 1),
                       **({"val": asdict(errors)} if errors else {}))
        return errors

    def _build(self, newest: Path | None) -> None:
        shapes = whole_shapes(self.recipe, self.classes)
        self.network = self.world.build(self.recipe, self.classes, self.identity.seed)
        self.optimizer = optimizer_of(self.network, self.recipe)
        self.train_step = TrainingStep(self.network, self.optimizer, first_class(self.classes, self.world.exchange),
                                       self.world.exchange, self.world.graphs)
        self.tensors: dict[str, Tensor] = {}  # what a checkpoint holds
        for name, parameter in self.network.named_parameters():
            self.tensors[name] = parameter.detach()
            self.tensors[f"velocity.{name}"] = self.optimizer.state[parameter]["velocity"]
        self.shapes = shapes | {f"velocity.{name}": shape for name, shape in shapes.items()}
        self.step = 0
        if newest is not None:
            checkpoint.load(newest, self.tensors, self.shapes)
            state = checkpoint.read_state(newest)
            try:
                self.step, self.progress = state["step"], Progress(**state["progress"])
                self.trained_s = float(state["trained_s"])
                if self.train_step.loss_scale and state.get("loss_scale"):
                    self.train_step.loss_scale.scale = float(state["loss_scale"])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{newest}: damaged ({type(error).__name__}: {error}); remove it to use the one "
                                "before") from None

    def _step(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take one training step; return the loss and the number of images classified right."""
        epoch = self.step // self.steps_per_epoch
        self.rate = set_rates(self.optimizer, self.recipe, Moment(self.step, self.total_steps, epoch, self.progress))
        if self.recipe.colour_shrink != 1 and self.batches.has_lighting(epoch):
            pixels.div_(self.recipe.colour_shrink)
        return self.train_step(pixels, labels, self.step)

    def _control(self, pixels: Tensor, labels: Tensor, due: bool, interval: Interval) -> bool:
        """Compare notes with the other tower: the batch, the health, and whether either wants a checkpoint."""
        sound = all(bool(torch.isfinite(tensor).all()) for tensor in (*self.tensors.values(), interval.loss))
        notes = torch.tensor([*checksums(pixels, labels), due, not sound, int(1e6 * interval.waited_for_peer_s())])
        if self.world.exchange is not None:
            theirs = self.world.exchange.swap(notes.to(self.world.device), "notes on the step").cpu()
            if not torch.equal(notes[:2], theirs[:2]):
                self._fail("the two towers were given different images; do both hosts read the same shards with "
                           "the same decoder?")
            notes = torch.maximum(notes, theirs)
            interval.peer_waited_s = float(theirs[4]) / 1e6
        if notes[3]:
            self._fail(f"the loss (now {float(interval.loss) / interval.steps:.4g}) or the weights are not finite; the "
                       f"last good checkpoint is in {self.folder.checkpoints}; lower the learning rate or look at the "
                       "data")
        return bool(notes[2])

    def _fail(self, reason: str) -> NoReturn:
        """End the run; called by both towers alike."""
        self.log.write("failed", step=self.step, reason=reason)
        raise RunFailed(f"step {self.step}: {reason}")

    def _validate(self) -> Errors:
        began = time.perf_counter()
        batches = EvaluationLoader(self.validation, self.mean, 1, self.recipe.batch, self.world.device,
                                   self.recipe.pixel_scale, self.world.threads, self.recipe.mean_at, self.recipe.crop)
        errors = error_rates(self.network, batches, self.classes, self.world)
        self.progress = self.recipe.schedule.observe(self.progress, errors.top1)
        epoch = self.step // self.steps_per_epoch
        self.log.write("epoch", epoch=epoch, step=self.step, val=asdict(errors), trained_s=round(self.trained_s, 1),
                       validation_s=round(time.perf_counter() - began, 1))
        if self.world.leads:
            tqdm.write(f"epoch {epoch}: loss {self.last_loss:.3f}, validation top-1 error {errors.top1:.2%}, "
                       f"top-5 {errors.top5:.2%}, {self.trained_s:.0f} s of training", file=sys.stderr)
        return errors

    def _save(self) -> None:
        if self.world.leads and not self.folder.is_there():
            raise RunFailed(f"{self.folder.path}: removed or renamed while the run went on, which ends here")
        scale = self.train_step.loss_scale
        state = {"progress": asdict(self.progress), "trained_s": self.trained_s,
                 "loss_scale": scale.scale if scale else None, **self.identity.to_dict()}
        path = checkpoint.save(self.folder.checkpoints, self.step, self.tensors, self.shapes, state, self.options.keep)
        self.log.write("checkpoint", step=self.step, path=str(path.relative_to(self.folder.path)))

    def _log_start(self, newest: Path | None) -> None:
        world = self.world
        self.log.write(
            "resume" if newest else "start", command=facts.command(), commit=facts.commit(), code=facts.code_hash(),
            versions=facts.versions(), hardware=facts.hardware(world.device), processes=world.size,
            threads=world.threads, device=str(world.device), precision=world.precision,
            transport=world.transport if world.size > 1 else None, step=self.step,
            steps_per_epoch=self.steps_per_epoch, images=len(self.training), **self.identity.to_dict())

    def _log_interval(self, interval: Interval, bar: tqdm) -> None:
        figures = interval.figures()
        self.trained_s += interval.seconds
        self.last_loss = figures["loss"]
        self.log.write("steps", step=self.step, epoch=self.step / self.steps_per_epoch,
                       rate=self.rate, **figures)
        bar.set_postfix_str(f"loss {figures['loss']:.3f}, {figures['images_per_s']:.0f} images/s")


def checksums(pixels: Tensor, labels: Tensor) -> tuple[int, int]:
    """Return two numbers that depend on every label, every pixel's bits and their order in the batch."""
    place = torch.arange(1, len(labels) + 1, device=labels.device)
    bits = pixels.movedim(1, -1).flatten(1).view(torch.int32)
    return int((labels * place).sum()), int((bits.sum(1, dtype=torch.int64) * place).sum())
