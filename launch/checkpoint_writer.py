"""Writes checkpoints beside the training: `torch.distributed.checkpoint` copies the tensors and writes the copies in a
thread of its own.

A checkpoint is written under a temporary name and renamed when it is whole, so those that are there are good.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter, SavePlan
from torch.distributed.device_mesh import DeviceMesh

from launch.checkpoint import BEST, STATE, best, cause, name_of, remove, sealed, steps, whole_network
from launch.errors import RunFailed
from model.errors import PeerError, reason
from pipeline.files import sha256_of, sync, write_durably

UNDER_WAY, OVER, BROKEN = range(3)
LOOK_S = 0.5  # how often processes that wait for the end of a writing tell each other that they are still there


class NotWritten(RunFailed):
    """A checkpoint could not be written: the disk is full, perhaps."""


@dataclass(frozen=True)
class Written:
    """A checkpoint that is whole now."""

    step: int
    path: Path
    held_s: float  # how long the training waited
    seconds: float  # from its beginning to its end


class CheckpointWriter:
    """Writes to `folder`/step-N, one at a time, and keeps the newest `keep` and the best one.

    All processes of `mesh` (None: there is one) make the same calls at the same steps; `group` is theirs for nothing
    else, and `gather` is World.gather.
    """

    def __init__(self, folder: Path, whole: dict[str, torch.Size], keep: int, mesh: DeviceMesh | None = None,
                 group: dist.ProcessGroup | None = None,
                 gather: Callable[[list[float]], list[list[float]]] = lambda numbers: [numbers]):
        self._folder, self._whole, self._keep = folder, whole, keep
        self._mesh, self._group, self._gather = mesh, group, gather
        self._writing: Future | None = None
        self._best: tuple[int, float] | None = None  # step and validation error

    def begin(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        """Copy this process's `tensors` and begin to write them; `state` is JSON to lie beside them. Call `finish`
        before, if another is under way."""
        self._began = time.perf_counter()
        self._step, self._path = step, self._folder / name_of(step)
        storage = _Storage(self._path, {**state, "step": step}, self._keep)
        self._writing = dcp.async_save(
            whole_network(tensors, self._whole, self._mesh), storage_writer=storage, process_group=self._group,
            no_dist=self._mesh is None, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
        self._ended: list[float] = []
        self._writing.add_done_callback(lambda _, ended=self._ended: ended.append(time.perf_counter()))
        self._held_s = time.perf_counter() - self._began

    def has_failed(self) -> bool:
        """Whether `finish` is going to raise: the processes are to tell each other and then call it."""
        return self._is_over() and self._writing.exception() is not None

    def written(self) -> Written | None:
        """Return what has become whole since it was last asked for, if anything has."""
        if not self._is_over() or self._writing.exception():
            return None
        self._writing = None
        if self._best is not None and self._best[0] == self._step:
            self._mark_best()
        return Written(self._step, self._path, self._held_s, self._ended[0] - self._began)

    def finish(self) -> None:
        """Wait until what was begun is whole. Raises NotWritten in all processes where it cannot be, PeerError where
        one of them dies or hangs meanwhile."""
        if self._writing is None and self._mesh is None:
            return
        while True:
            standings = [standing for standing, in self._gather([self._standing()])]
            if min(standings) >= OVER or max(standings) == BROKEN:
                break
            wait([self._writing] if self._writing else [], LOOK_S)
        if self._writing is None:
            return
        if not self._is_over():
            raise PeerError("another process broke off in a checkpoint")
        error = self._writing.exception()
        if error is not None:
            self._writing = None
        if isinstance(error, (dcp.CheckpointException, OSError)):
            raise NotWritten(f"{self._path}: the checkpoint cannot be written ({cause(error)}); mend that and go on "
                             "with --resume")
        if isinstance(error, RuntimeError):
            raise PeerError(f"another process died or hangs at a checkpoint ({reason(error)})") from error
        if error is not None:
            raise error

    def _standing(self) -> int:
        """UNDER_WAY, OVER, or BROKEN: ended by what DCP does not tell the other processes, who wait in it in vain."""
        if self._writing is None:
            return OVER
        if not self._is_over():
            return UNDER_WAY
        return OVER if isinstance(self._writing.exception(), (dcp.CheckpointException, type(None))) else BROKEN

    def _is_over(self) -> bool:
        """Whether what was begun has come to an end, of which the time is known: a Future is done a moment before."""
        return self._writing is not None and bool(self._ended)

    def mark_best(self, step: int, top1_error: float) -> None:
        """Have the checkpoint of `step` be kept until a better one comes, as soon as it is whole; rank 0's."""
        self._best = step, top1_error
        if (self._folder / name_of(step)).is_dir():
            self._mark_best()

    def _mark_best(self) -> None:
        step, top1_error = self._best
        with suppress(OSError):  # a full disk: the best one before stays it
            write_durably(self._folder / BEST, json.dumps({"step": step, "top1_error": top1_error}).encode())


def save(folder: Path, step: int, tensors: dict[str, Tensor], whole: dict[str, torch.Size], state: dict) -> Path:
    """Write `folder`/step-N, of one process alone, and wait for it; return its place. Raises NotWritten."""
    writer = CheckpointWriter(folder, whole, keep=1)
    writer.begin(step, tensors, state)
    writer.finish()
    return folder / name_of(step)


class _Storage(HuggingFaceStorageWriter):
    """Where DCP writes: of these methods its coordinator, rank 0, calls all but the first alone, and what one raises
    there is raised in all processes."""

    def __init__(self, final: Path, state: dict, keep: int):
        self._final, self._state, self._keep = final, state, keep
        self._temporary = final.with_name(f"{final.name}.tmp")
        super().__init__(str(self._temporary), save_distributed=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # torch's would make the folder, in every process

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for unfinished in self._final.parent.glob("step-*.tmp"):  # a kill left it
            remove(unfinished)
        self._temporary.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def finish(self, metadata, results) -> None:
        names = {written.storage_data.relative_path for of_a_process in results for written in of_a_process}
        files = {name: sha256_of(self._temporary / name) for name in sorted(names)}
        write_durably(self._temporary / STATE, sealed({**self._state, "files": files}))
        os.replace(self._temporary, self._final)
        folder = self._final.parent
        sync(folder)
        for old in steps(folder)[: -self._keep]:
            if old != best(folder):
                remove(old)  # what stays does no harm to the one that is whole
