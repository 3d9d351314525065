"""The training loop: one process's part of a run, what it writes, and when it stops."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from launch import checkpoint, facts
from launch.board import Board
from launch.checkpoint_writer import CheckpointWriter
from launch.environment import job, most_restarts, restarts, tell_ending
from launch.errors import RunFailed, Stopped, UserError
from launch.evaluate import Errors, error_rates
from launch.interval import Interval
from launch.profiling import profiled
from launch.run_folder import Run, RunFolder
from launch.runlog import RunLog
from launch.saving import Saving
from launch.step_file import StepFile
from launch.stopping import StopRequest
from launch.world import World
from model.errors import PeerError, reason
from model.optimizer import optimizer_of, set_rates
from model.schedule import Moment, Progress
from model.softmax import first_class
from model.tower import whole_shapes
from model.training import TrainingStep
from pipeline.batches import Lighting, TrainingBatches
from pipeline.errors import DataError
from pipeline.loader import EvaluationLoader, TrainingLoader
from pipeline.manifest import Manifest
from pipeline.mean import load_mean
from pipeline.shards import ShardImages

CONTROL_STEPS = 10  # how often the processes compare batches, look at the loss and may begin a checkpoint


@dataclass(frozen=True)
class Options:
    """How to run; what is learned does not depend on these."""

    resume: bool = False
    stop_after: int | None = None  # steps in all; None: to the recipe's end
    checkpoint_minutes: float = 15.0
    keep: int = 3  # checkpoints, besides the best
    check_hashes: bool = True  # of all shards, before the start
    profile: bool = False  # write a trace of a few steps


class Trainer:
    """One process's part of a run: its network, its data, its log."""

    def __init__(self, world: World, shards: Path, manifest: Manifest, run: Run, folder: RunFolder,
                 options: Options):
        self.world, self.identity, self.folder, self.options = world, run, folder, options
        self.recipe = recipe = run.recipe
        self.mean = load_mean(shards / manifest.mean.name)
        self.classes = len(manifest.classes)
        self.training, self.validation = (ShardImages(shards, manifest, split) for split in ("train", "val"))
        lighting = Lighting.from_covariance(np.array(manifest.rgb_covariance), recipe.colour_std, recipe.colour_by)
        self.batches = TrainingBatches(len(self.training), recipe.batch, run.seed, lighting, recipe.colour_epochs,
                                       recipe.crops_and_flips, recipe.crops_shared_by, recipe.mean_at, recipe.crop)
        self.part = world.replica, world.replicas
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = self.recipe.epochs * self.steps_per_epoch
        self.stop = min(self.total_steps, options.stop_after or self.total_steps)
        self.step, self.progress, self.errors = 0, Progress(), None
        self.validates = False  # whether an epoch has ended that has not been validated
        self.trained_s = 0.0  # without validation, earlier parts of a resumed run included
        self.overhead_s = 0.0  # of this process: looking after the run, its log, and beginning checkpoints
        self.epoch_loss, self.epoch_steps = 0.0, 0  # a sum over the steps of this epoch, as far as this part did them

    def run(self, newest: Path | None) -> Errors | None:
        """Train from `newest`, or from the start; return the last validation's errors."""
        self._build(newest)
        if self.world.leads and (newest or self.options.resume or restarts()):
            begins = (f"going on from step {self.step} of {self.total_steps}" if newest else
                      f"{self.folder.checkpoints}: no checkpoint there, so from the start")
            again = f" (restart {restarts()} of {most_restarts()})" if restarts() else ""
            print(begins + again, file=sys.stderr)
        with (Board(self.folder.path if self.world.leads else None) as self.board,
              RunLog(self.folder.log_path if self.world.leads else None, self.board.record) as self.log,
              StepFile(self.folder.step_path if self.world.leads else None) as self.step_file,
              StopRequest() as self.stop_request):
            self.saving = Saving(self.writer, self.log, self.world.leads)
            self._log_start(newest)
            self._show_kernels()
            try:
                self._loop()
            except (RunFailed, UserError, DataError) as error:
                self.log.write("failed", step=self.step, reason=str(error))
                raise
            self.log.write("end", step=self.step, trained_s=round(self.trained_s, 1), repeated=self.step_file.repeated,
                           overhead_s=round(self.overhead_s, 2),
                           **({"val": asdict(self.errors)} if self.errors else {}))
            tell_ending(0)  # from now on SIGTERM changes nothing
        return self.errors

    def _loop(self) -> None:
        if self.validates:
            self._validate()
        saved_at = time.monotonic()
        images = TrainingLoader(self.training, self.mean, self.batches, self.world.device, self.recipe.pixel_scale,
                                self.world.threads, self.step, self.world.pictures, self.part)
        bar = tqdm(total=self.stop, initial=self.step, unit="step", disable=None if self.world.leads else True,
                   dynamic_ncols=True)
        trace = self.folder.trace_path(self.world.rank) if self.options.profile and not self.world.replica else None
        with images, bar, profiled(trace) as end_step:
            interval, first = Interval(images, self.world), self.step
            while self.step < self.stop and not self.recipe.schedule.ended(self.progress):
                with record_function("wait for data"):
                    pixels, labels = next(images)
                if self.step == first:
                    batch = self.batches.at(*divmod(self.step, self.steps_per_epoch))
                    self.board.crops(pixels, batch, self.mean, self.recipe.pixel_scale, self.step)
                interval.add(*self._step(pixels, labels), len(labels))
                end_step()
                self.step += 1
                self.step_file.write(self.step)
                bar.update()
                self.validates = self.step % self.steps_per_epoch == 0
                if not (self.step % CONTROL_STEPS == 1 or self.validates or self.step == self.stop):
                    continue
                if self.world.device.type == "cuda":
                    torch.cuda.synchronize()  # what it still has to do is training
                looked = time.perf_counter()
                late = time.monotonic() - saved_at > 60 * self.options.checkpoint_minutes
                due, stopped = self._control(pixels, labels, late, interval, bar)
                if due or stopped or self.validates or self.step == self.stop:
                    self._save()
                    saved_at = time.monotonic()
                self.overhead_s += time.perf_counter() - looked
                if stopped:
                    self._end_early()
                if self.validates:
                    self._validate()
                    self._show_kernels()
                interval = Interval(images, self.world)
        self.saving.settle(self.step, last=True)

    def _build(self, newest: Path | None) -> None:
        world, shapes = self.world, whole_shapes(self.recipe, self.classes)
        self.network = world.build(self.recipe, self.classes, self.identity.seed)
        self.optimizer = optimizer_of(self.network, self.recipe)
        self.tensors: dict[str, Tensor] = {}  # what a checkpoint holds
        for name, parameter in self.network.named_parameters():
            self.tensors[name] = parameter.detach()
            self.tensors[f"velocity.{name}"] = self.optimizer.state[parameter]["velocity"]
        shapes |= {f"velocity.{name}": shape for name, shape in shapes.items()}
        if newest is not None:
            checkpoint.load(newest, self.tensors, shapes, world.mesh)
        with self._replicas_lost():
            averaged = world.averaged(self.network)
        self.train_step = TrainingStep(self.network, self.optimizer, first_class(self.classes, world.exchange),
                                       world.exchange, world.graphs, averaged)
        self.writer = CheckpointWriter(self.folder.checkpoints, shapes, self.options.keep, world.mesh, world.writing,
                                       world.gather)
        if newest is not None:
            self._take_up(checkpoint.read_state(newest), newest)

    def _take_up(self, state: dict, newest: Path) -> None:
        try:
            self.step, self.progress = state["step"], Progress(**state["progress"])
            self.trained_s = float(state["trained_s"])
            # Its checkpoint is begun before an epoch is validated. (Those of earlier versions were written after.)
            self.validates = bool(state.get("validates", False))
            if self.train_step.loss_scale and state.get("loss_scale"):
                self.train_step.loss_scale.scale = float(state["loss_scale"])
                self.train_step.loss_scale.good_steps = int(state.get("good_steps") or 0)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{newest}: damaged ({type(error).__name__}: {error}); remove it to use the one "
                            "before") from None

    def _step(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take one training step; return the loss and the number of images classified right."""
        epoch = self.step // self.steps_per_epoch
        self.rate = set_rates(self.optimizer, self.recipe,
                              Moment(self.step, self.total_steps, epoch, self.progress))
        if self.recipe.colour_shrink != 1 and self.batches.has_lighting(epoch):
            pixels.div_(self.recipe.colour_shrink)
        with self._replicas_lost():
            return self.train_step(pixels, labels, self.step)

    @contextmanager
    def _replicas_lost(self) -> Iterator[None]:
        """Where gradients are averaged, take torch's errors for what they mostly are: another replica's end. (But those
        of this process's device; gloo's have no type of their own.)"""
        try:
            yield
        except (PeerError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            own = not isinstance(error, dist.DistError) and re.search("CUDA|CUBLAS|cuDNN|alloc", str(error))
            if self.world.gradients is None or own:
                raise
            raise PeerError(f"another process died or hangs (averaging gradients: {reason(error)})") from error

    def _control(self, pixels: Tensor, labels: Tensor, late: bool, interval: Interval, bar: tqdm) -> tuple[bool, bool]:
        """Compare notes with the other processes and write the log: the batch, the health. Return whether any wants a
        checkpoint, and whether any was asked to stop."""
        # A sum is finite only where all is, and takes no memory.
        sound = bool(torch.stack([tensor.sum() for tensor in self.tensors.values()]).isfinite().all())
        flags = [late, self.stop_request.made, not sound, self.writer.has_failed()]
        told = self.world.gather([*checksums(pixels, labels), *flags, *interval.told()])
        late, stopped, unsound, failed = (any(column) for column in list(zip(*told))[2:6])
        for first in range(0, len(told), self.world.towers):
            if any(notes[:2] != told[first][:2] for notes in told[first : first + self.world.towers]):
                raise RunFailed(f"step {self.step}: the two towers were given different images; do both hosts read "
                                "the same shards with the same decoder?")
        figures = interval.figures([notes[6:] for notes in told])
        if unsound or not np.isfinite(figures["loss"]):
            raise RunFailed(
                f"step {self.step}: the loss (now {figures['loss']:.4g}) or the weights are not finite; the last good "
                f"checkpoint is in {self.folder.checkpoints}; lower the learning rate or look at the data")
        if failed:
            self.saving.settle(self.step)
        self.trained_s += interval.seconds
        self.epoch_loss += figures["loss"] * interval.steps
        self.epoch_steps += interval.steps
        self.log.write("steps", step=self.step, steps=interval.steps, epoch=self.step / self.steps_per_epoch,
                       rate=self.rate, **figures)
        bar.set_postfix_str(f"loss {figures['loss']:.3f}, error {figures['train_top1_error']:.1%}, "
                            f"{figures['images_per_s']:,.0f} images/s, {figures['memory_gib']:.1f} GiB")
        self.saving.tell()
        return late, stopped

    def _end_early(self) -> NoReturn:
        """End a run that was asked to stop; called by all processes alike, after a checkpoint was begun."""
        self.saving.settle(self.step, last=True)
        self.log.write("stopped", step=self.step)
        raise Stopped(f"stopped by SIGTERM at step {self.step} of {self.total_steps}, of which there is a checkpoint: "
                      "go on with --resume")

    def _validate(self) -> None:
        began = time.perf_counter()
        world, recipe = self.world, self.recipe
        batches = EvaluationLoader(self.validation, self.mean, 1, recipe.batch // world.replicas, world.device,
                                   recipe.pixel_scale, world.threads, recipe.mean_at, recipe.crop, self.part)
        self.errors = errors = error_rates(self.network, self._until_stopped(batches), self.classes, self.world)
        if errors.top1 < self.progress.best_error and self.world.leads:
            self.folder.check_held()
            self.writer.mark_best(self.step, errors.top1)
        self.progress, self.validates = self.recipe.schedule.observe(self.progress, errors.top1), False
        epoch = self.step // self.steps_per_epoch
        self.log.write("epoch", epoch=epoch, step=self.step, val=asdict(errors), trained_s=round(self.trained_s, 1),
                       validation_s=round(time.perf_counter() - began, 1))
        if self.world.leads:
            loss = f"loss {self.epoch_loss / self.epoch_steps:.3f}, " if self.epoch_steps else ""
            tqdm.write(f"epoch {epoch}: {loss}validation top-1 error {errors.top1:.2%}, "
                       f"top-5 {errors.top5:.2%}, {self.trained_s:.0f} s of training", file=sys.stderr)
        self.epoch_loss, self.epoch_steps = 0.0, 0

    def _until_stopped(self, batches: EvaluationLoader) -> Iterator[tuple[Tensor, Tensor]]:
        """Give `batches`, unless a process is asked to stop, which ends the run: its checkpoint is of before."""
        smallest = len(self.validation) // self.world.replicas  # some replicas have one image more
        for number, batch in enumerate(batches):
            if number % CONTROL_STEPS == 0 and number * batches.batch_size < smallest:
                if any(asked for asked, in self.world.gather([self.stop_request.made])):
                    self._end_early()
            yield batch

    def _show_kernels(self) -> None:
        """Give the board conv1's kernels, of both towers."""
        kernels, exchange = self.network.conv1.weight.detach().clone(), self.world.exchange
        if exchange is not None:
            both = [kernels, exchange.swap(kernels, "kernels")]
            kernels = torch.cat(both if exchange.tower == 0 else both[::-1])
        self.board.kernels(kernels, self.recipe.kernels[0] // self.recipe.towers, self.step)

    def _save(self) -> None:
        """Begin a checkpoint, of sound shards."""
        if self.world.leads:
            self.folder.check_held()
        for images in (self.training, self.validation):
            images.check_unchanged()
        scale = self.train_step.loss_scale
        self.saving.begin(self.step, self.tensors, {
            "progress": asdict(self.progress), "validates": self.validates, "trained_s": self.trained_s,
            "loss_scale": scale.scale if scale else None, "good_steps": scale.good_steps if scale else None,
            **self.identity.to_dict()})

    def _log_start(self, newest: Path | None) -> None:
        world = self.world
        again = max(0, self.step_file.before - self.step)
        self.step_file.repeated += again
        self.log.write(
            "resume" if newest or self.step_file.before else "start", command=facts.command(), commit=facts.commit(),
            code=facts.code_hash(), versions=facts.versions(), hardware=facts.hardware(world.device), job=job(),
            processes=world.size, replicas=world.replicas, threads=world.threads, device=str(world.device),
            precision=world.precision, transport=world.transport if world.towers > 1 else None, step=self.step,
            repeats=again, validates=self.validates, steps_per_epoch=self.steps_per_epoch, images=len(self.training),
            stop=self.stop, **self.identity.to_dict())


def checksums(pixels: Tensor, labels: Tensor) -> tuple[int, int]:
    """Return two numbers that depend on every label, every pixel's bits and their order in the batch, below 2^52: a
    float64 holds them."""
    place = torch.arange(1, len(labels) + 1, device=labels.device)
    bits = pixels.movedim(1, -1).flatten(1).view(torch.int32)
    return tuple(int(total) % (1 << 52) for total in
                 ((labels * place).sum(), (bits.sum(1, dtype=torch.int64) * place).sum()))
