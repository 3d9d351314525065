"""What goes wrong in days of training that is nobody's death: full disks, clocks that jump, memory that runs out."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from launch import checkpoint, checkpoint_writer, trainer
from launch.errors import OutOfMemory, RunFailed, Stopped
from launch.evaluate import Errors, error_rates
from launch.run_folder import RunFolder
from launch.runlog import RunLog, read_log
from launch.saving import NOT_WRITTEN
from launch.train import train
from launch.trainer import Options, Trainer
from launch.world import join_world
from model.recipe import TINY
from model.training import TrainingStep

STEPS = 45  # three epochs: a checkpoint after each


def run_in(folder, shards, **options):
    with join_world("cpu", "rpc", 60, 1) as world:
        return train(world, shards, RunFolder(folder), replace(TINY, epochs=3), 0, None, Options(**options))


@pytest.fixture
def full_disk(monkeypatch):
    """Have the next so many checkpoints find no space left."""
    def fill(times: int) -> None:
        write = checkpoint_writer._Storage.write_data
        left = [times]

        def fails(storage, *arguments):
            if left[0]:
                left[0] -= 1
                raise OSError(errno.ENOSPC, "No space left on device", str(storage.path))
            return write(storage, *arguments)

        monkeypatch.setattr(checkpoint_writer._Storage, "write_data", fails)

    return fill


def test_a_disk_that_is_full_for_a_while(shards, tmp_path, full_disk, capfd):
    """The training goes on, and so do its checkpoints."""
    full_disk(NOT_WRITTEN - 1)
    errors = run_in(tmp_path / "run", shards)
    told = [line for line in capfd.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(told) == 2 and "No space left on device" in told[0] and "the training goes on" in told[0]
    assert [path.name for path in checkpoint.steps(tmp_path / "run/checkpoints")] == ["step-000000045"]
    records = read_log(tmp_path / "run/log.jsonl")
    first, second = [record["step"] for record in records if record["event"] == "not written"]
    assert 15 < first <= 30 < second <= 45  # seen by a look after
    assert records[-1]["event"] == "end" and records[-1]["val"]["top1"] == errors.top1


def test_a_disk_that_stays_full_ends_the_run(shards, tmp_path, full_disk):
    full_disk(NOT_WRITTEN)
    with pytest.raises(RunFailed, match="step-000000045: the checkpoint cannot be written .*No space left on device.*"
                       "go on with --resume"):
        run_in(tmp_path / "run", shards)
    assert checkpoint.steps(tmp_path / "run/checkpoints") == []


def test_a_log_that_cannot_be_written_loses_lines_and_says_so_once(tmp_path, capfd, monkeypatch):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write("start", step=0)
        whole, log._file = log._file, open("/dev/full", "ab", buffering=0)
        for step in (1, 2):
            log.write("steps", step=step)
        log._file.close()
        log._file = whole
        log.write("steps", step=3)
    assert capfd.readouterr().err.count("the log cannot be written (No space left on device)") == 1
    assert [record["step"] for record in read_log(path)] == [0, 3]


def test_a_clock_that_jumps(shards, tmp_path, monkeypatch):
    """Durations, speeds and the time for a checkpoint do not come from the clock on the wall."""
    jumping, now = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: now() + jumping.uniform(-1e6, 1e6))
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time(time.localtime(now() + jumping.uniform(-1e6, 1e6))))
    began = time.monotonic()
    run_in(tmp_path / "run", shards)
    lasted = time.monotonic() - began
    records = read_log(tmp_path / "run/log.jsonl")
    steps = [record for record in records if record["event"] == "steps"]
    times = [record["time"] for record in records]
    assert times != sorted(times), "the clock did not jump"
    assert all(0 < record["images_per_s"] < 1e5 and 0 <= record["waiting_for_data"] <= 1 for record in steps)
    assert 0 < records[-1]["trained_s"] < lasted
    assert all(0 <= record["held_s"] <= record["seconds"] < lasted
               for record in records if record["event"] == "checkpoint")
    assert [record["step"] for record in records if record["event"] == "checkpoint"] == [15, 30, 45]  # none was early


def test_a_device_without_memory_may_have_some_later(shards, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingStep, "__call__", no_memory)
    with pytest.raises(OutOfMemory, match="cpu: out of memory with recipe tiny and a batch of 32"):
        run_in(tmp_path / "run", shards)


def test_the_best_checkpoint_is_kept_beside_the_newest(shards, tmp_path, monkeypatch):
    errors = iter([0.5, 0.3, 0.4, 0.4, 0.35])
    monkeypatch.setattr(trainer, "error_rates", lambda *_: Errors(next(errors), 0.1, 50))
    with join_world("cpu", "rpc", 60, 1) as world:
        folder = RunFolder(tmp_path / "run")
        train(world, shards, folder, replace(TINY, epochs=5), 0, None, Options(keep=1))
    assert [path.name for path in checkpoint.steps(folder.checkpoints)] == ["step-000000030", "step-000000075"]
    assert folder.best_checkpoint(folder.read()).name == "step-000000030"
    assert json.loads((folder.checkpoints / "best.json").read_text()) == {"step": 30, "top1_error": 0.3}


def test_a_validation_ends_when_it_is_asked_to(shards, tmp_path, monkeypatch):
    """Nothing is lost: its epoch's checkpoint was begun before, and what goes on validates again."""
    def asked(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return error_rates(*arguments)

    monkeypatch.setattr(trainer, "error_rates", asked)
    with pytest.raises(Stopped, match="at step 15 of 45, of which there is a checkpoint"):
        run_in(tmp_path / "run", shards)
    assert [record["event"] for record in read_log(tmp_path / "run/log.jsonl")][-2:] == ["checkpoint", "stopped"]
    monkeypatch.undo()
    run_in(tmp_path / "run", shards, resume=True)
    validated = [record["step"] for record in read_log(tmp_path / "run/log.jsonl") if record["event"] == "epoch"]
    assert validated == [15, 30, 45]


@pytest.mark.parametrize("images, replicas, looks", [
    (1280, 2, 1), (1281, 2, 1), (1282, 2, 2), (2561, 2, 2), (63, 3, 1),
])  # fmt: skip
def test_replicas_look_as_often_whatever_their_parts(images, replicas, looks):
    """Though one may have a batch more than another: 64 images each, of parts that differ by an image."""
    for part in {images // replicas, -(-images // replicas)}:
        gathered = []
        world = SimpleNamespace(replicas=replicas, gather=lambda told: gathered.append(told) or [told])
        run = SimpleNamespace(validation=range(images), stop_request=SimpleNamespace(made=False), world=world)
        batches = type("Batches", (list,), {"batch_size": 64})(range(-(-part // 64)))
        assert list(Trainer._until_stopped(run, batches)) == batches and len(gathered) == looks
