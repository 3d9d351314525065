"""Runs as a user has them: torchrun, kills, resumes, and what goes wrong."""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from towers_at_work import STEPS, Towers, alexnet, assert_same, children_of, wait_for_steps, weights

from launch import checkpoint
from launch.cli import cli
from launch.errors import RunFailed
from launch.profiling import RECORDED, SKIPPED
from launch.run_folder import RunFolder
from launch.runlog import RunLog, read_log
from launch.train import train
from launch.trainer import Options
from launch.world import join_world
from model.recipe import TINY


def test_a_run_on_raw_pixels_is_a_run_on_jpegs_up_to_their_loss(shards, finished, tmp_path):
    Towers(shards.parent / "raw", tmp_path / "raw").check()
    losses = [[record["loss"] for record in read_log(run / "log.jsonl") if record["event"] == "steps"]
              for run in (finished, tmp_path / "raw")]
    assert len(losses[0]) == len(losses[1]) >= 3
    # Small differences grow from step to step: the first steps agree closely, the last ones in their course.
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.005) and losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    errors = [read_log(run / "log.jsonl")[-1]["val"] for run in (finished, tmp_path / "raw")]
    assert errors[0]["images"] == errors[1]["images"] == 50


def test_two_processes_go_on_as_one_and_back(shards, finished, tmp_path):
    """From one checkpoint the next step is the same in one process and two, to the rounding of float32.

    A unit of a lower layer within that of zero changes sign and gradients: the last layer does not feel it.
    """
    def last_layer(tensors):
        return {name: tensor for name, tensor in tensors.items() if "fc8" in name}

    one, two, four = (Path(shutil.copytree(finished, tmp_path / name)) for name in ("one", "two", "four"))

    def go_on(steps: int, *started: tuple[Path, int]) -> None:
        for towers in [Towers(shards, run, "--resume", "--steps", steps, processes=number) for run, number in started]:
            towers.check()

    for run in (one, two, four):
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS:09d}")
    go_on(16, (one, 1), (two, 2), (four, 4))
    assert len(list((four / "checkpoints" / "step-000000016").glob("*.safetensors"))) == 2  # of one replica
    assert len(list((one / "checkpoints" / "step-000000016").glob("*.safetensors"))) == 1
    assert_same(weights(one, 16), weights(two, 16), tolerance=0.03)
    assert_same(last_layer(weights(one, 16)), last_layer(weights(two, 16)), tolerance=1e-5)
    go_on(17, (one, 2), (two, 1), (four, 2))
    assert_same(weights(one, 17), weights(two, 17), tolerance=0.03)
    assert_same(last_layer(weights(one, 17)), last_layer(weights(two, 17)), tolerance=1e-3)


def test_a_trace_shows_the_parts_of_a_step(shards, tmp_path):
    run = tmp_path / "run"
    Towers(shards, run, "--steps", SKIPPED + RECORDED, "--profile").check()
    for tower in (0, 1):
        events = json.loads((run / f"trace-tower{tower}.json").read_text())["traceEvents"]
        names = collections.Counter(event["name"] for event in events if event.get("ph") == "X")
        assert all(names[part] == 5 for part in ("wait for data", "forward", "backward")), names
        assert names["wait for the other tower"] >= 5 * 9 and names["Optimizer.step#MomentumSGD.step"] == 5


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["rpc", "cuda-ipc"])
def test_two_towers_train_and_resume_on_gpus(shards, tmp_path, transport):
    """Each on a GPU of its own, or both on one."""
    run, device = tmp_path / "run", ("--device", "cuda", "--transport", transport)
    Towers(shards, run, *device, "--steps", 16).check()
    Towers(shards, run, *device, "--resume").check()
    losses = [record["loss"] for record in read_log(run / "log.jsonl") if record["event"] == "steps"]
    assert losses[-1] < losses[0]


def test_log_says_what_was_run(finished):
    first, *rest = read_log(finished / "log.jsonl")
    assert first["event"] == "start" and first["recipe"]["name"] == "tiny" and first["processes"] == 2
    assert first["command"].startswith("alexnet train ") and first["versions"]["torch"] == torch.__version__
    assert {"commit", "code", "hardware", "data", "seed", "transport"} <= first.keys()
    steps = [record for record in rest if record["event"] == "steps"]
    assert steps[-1]["step"] == STEPS
    for record in steps:
        assert 0 <= record["waiting_for_data"] <= 1 and 0 <= record["waiting_for_peer"] <= 1
        assert record["images_per_s"] > 0 and 0 < record["loss"] < 20
    epochs = [record for record in rest if record["event"] == "epoch"]
    assert [record["val"]["images"] for record in epochs] == [50]


def test_evaluation_is_the_same_in_one_process_and_two(torchrun, shards, finished):
    for views in (1, 10):
        words = ["evaluate", finished, shards, "--views", views, "--json"]
        one = json.loads(CliRunner().invoke(cli, list(map(str, words))).stdout)
        assert one == json.loads(torchrun(2, *alexnet(*words)).stdout)
        assert one["images"] == 50 and one["views"] == views and one["step"] == STEPS
        assert 0 <= one["top5_error"] <= one["top1_error"] <= 1


def test_only_the_newest_checkpoints_are_kept(finished):
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "best.json", "step-000000015", f"step-{STEPS:09d}"]


def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(shards, tmp_path):
    folder = RunFolder(tmp_path / "run")
    wild = replace(TINY, learning_rate=1e12, epochs=1)
    told = "step .*the loss .now (nan|inf|[0-9.e+]+). or the weights are not finite; the last good checkpoint"
    with join_world("cpu", "rpc", 60, 1) as world, pytest.raises(RunFailed, match=told):
        train(world, shards, folder, wild, 0, None, Options(checkpoint_minutes=0))
    assert read_log(folder.log_path)[-1]["event"] == "failed"
    for path in folder.checkpoints.glob("step-*"):
        assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run", int(path.name[5:])).values())


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(shards, finished, tmp_path):
    """In two processes, which go on once, and end together."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:09d}")
    before = weights(run, 15)
    limit = str(2 << 20)  # bytes of any file written: the log fits, a checkpoint does not
    command = ["prlimit", f"--fsize={limit}", "bash", str(ROOT / "launch/train.sh"), str(shards), str(run), "--resume",
               "--checkpoint-minutes", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 1
    told = (r"going on from step 15 of 30\nepoch 1: .*\n"
            r"alexnet: .*step-000000021: the checkpoint cannot be written .*--resume \(or wait: .*\)\nepoch 2: .*\n"
            r"alexnet: .*step-000000030: the checkpoint cannot be written .*--resume\n")
    assert re.fullmatch(told, done.stderr), done.stderr
    assert_same(weights(run, 15), before)


# What the user does wrong: one line, exit code 2, nothing lost.


def fails_with(line: str, *arguments) -> None:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    told = result.output.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("alexnet: ") and re.search(line, told[0]), result.output


@pytest.fixture
def damaged(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "damaged"))


def test_missing_manifest(damaged, tmp_path):
    (damaged / "manifest.json").unlink()
    fails_with("manifest.json: cannot be read.*alexnet preprocess", "train", damaged, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_bytes_of_a_shard(damaged, tmp_path):
    shard = damaged / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    fails_with("train-00000.arrow: its bytes have changed", "train", damaged, tmp_path / "run", "--recipe", "tiny")
    fails_with("train-00000.arrow: its bytes have changed", "verify", damaged)


def test_folder_of_another_run_is_left_alone(shards, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    fails_with("holds files already", "train", shards, finished, "--recipe", "tiny")
    fails_with("a run of recipe tiny, not notes", "train", shards, finished, "--resume", "--recipe", "notes")
    fails_with("a run with seed 0 and 2 epochs", "train", shards, finished, "--resume", "--seed", "1")
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_stopping_before_the_checkpoint(shards, finished):
    fails_with("step 25 already, past --steps 10", "train", shards, finished, "--resume", "--steps", "10")


def test_resuming_nothing(shards, tmp_path):
    fails_with("no run there", "train", shards, tmp_path / "none", "--resume")
    fails_with("no run there", "evaluate", tmp_path / "none", shards)


BEFORE = 15  # the step of the checkpoint before the newest of `finished`


def test_of_a_damaged_checkpoint_the_one_before_is_taken(shards, finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    newest = run / "checkpoints" / f"step-{STEPS:09d}"
    file = sorted(newest.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    told = (f"alexnet: {file}: changed since it was written; taking the one before, step-{BEFORE:09d}\n")
    done = CliRunner().invoke(cli, ["evaluate", str(run), str(shards), "--json"])
    assert done.exit_code == 0 and done.stderr == told and json.loads(done.stdout)["step"] == BEFORE
    towers = Towers(shards, run, "--resume")
    output = towers.output()
    assert towers.process.returncode == 0 and output.startswith(f"{told}going on from step {BEFORE} of 30\n"), output
    assert_same(weights(finished), weights(run))
    assert (newest.with_name(f"{newest.name}.damaged") / file.name).stat().st_size == file.stat().st_size - 1


def test_damaged_checkpoints_alone(shards, finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for file in (run / "checkpoints").glob("*/state.json"):
        file.unlink()
    fails_with(f"step-{STEPS:09d}/state.json: damaged .* no other checkpoint is there to take", "evaluate", run, shards)
    fails_with("no other checkpoint is there to take", "train", shards, run, "--resume")
    assert len(list((run / "checkpoints").glob("step-?????????"))) == 2


@pytest.mark.parametrize("key, value", [
    ("step", 10**30), ("step", None), ("progress", None), ("progress", {"best_error": float("nan")}),
    ("trained_s", "x"), ("files", {}), ("files", []), ("files", {"../../run.json": "0"}), ("seal", 1),
])  # fmt: skip
def test_damaged_state_of_a_checkpoint(finished, tmp_path, key, value):
    run = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    path = run.checkpoints / f"step-{STEPS:09d}" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert run.newest_checkpoint(run.read()).name == f"step-{BEFORE:09d}"


def test_checkpoint_from_another_recipe(shards, finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    description = json.loads((run / "run.json").read_text())
    description["recipe"]["kernels"][0] = 96
    (run / "run.json").write_text(json.dumps(description))
    fails_with("step-000000025: a checkpoint of another run .recipe differ from", "evaluate", run, shards)


def test_a_folder_that_is_removed_while_the_run_goes_on(shards, tmp_path, monkeypatch):
    """Ends the run, in place of leaving checkpoints that belong to none."""
    folder, run = RunFolder(tmp_path / "run"), TINY
    with join_world("cpu", "rpc", 5, 1) as world:
        seen = []
        monkeypatch.setattr("launch.runlog.RunLog.write", lambda log, event, **_: seen.append(event) or (
            event == "start" and shutil.rmtree(folder.path)))
        with pytest.raises(RunFailed, match="run: removed or renamed while the run went on, which ends here"):
            train(world, shards, folder, run, 0, None, Options(stop_after=1))
    assert "start" in seen and not folder.checkpoints.exists()


def test_another_run_in_the_place_of_this_one_is_left_alone(shards, tmp_path, monkeypatch):
    """Where the folder of a run that goes on was renamed, and another one begun under its name."""
    folder, write = RunFolder(tmp_path / "run"), RunLog.write

    def renamed(log, event, **fields):
        write(log, event, **fields)
        if event == "start" and fields["seed"] == 0:
            folder.path.rename(tmp_path / "elsewhere")
            with join_world("cpu", "rpc", 5, 1) as world:
                train(world, shards, RunFolder(folder.path), TINY, 1, None, Options(stop_after=1))

    monkeypatch.setattr(RunLog, "write", renamed)
    with join_world("cpu", "rpc", 5, 1) as world:
        with pytest.raises(RunFailed, match="run: removed or renamed while the run went on, which ends here"):
            train(world, shards, folder, TINY, 0, None, Options(stop_after=1, keep=1))
    (kept,) = folder.checkpoints.iterdir()
    assert kept.name == "step-000000001" and checkpoint.check(kept)["seed"] == 1


def test_two_trainers_in_one_folder(shards, finished, tmp_path):
    """The second is told so, and leaves the first alone."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = sorted((path, path.read_bytes()) for path in run.rglob("*") if path.is_file())
    with RunFolder(run).held():
        for how in (["--resume"], []):
            done = subprocess.run([sys.executable, *alexnet("train", shards, run, *how, "--device", "cpu")],
                                  capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 2 and done.stderr.endswith(
                f"alexnet: {run}: another process trains there; wait for it, or choose another folder\n")
    assert sorted((path, path.read_bytes()) for path in run.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("processes, options, told", [
    (3, [], "3 processes: the network has two towers, so start 1 or an even number .torchrun --nproc-per-node., or "
            "train --whole"),
    (2, ["--whole", "--batch", "31"], "a batch of 31 images is not to be divided among 2 replicas: start another "
                                      "number of processes, or give another --batch"),
    (2, ["--timeout", "nan"], "Invalid value for '--timeout'.* See `alexnet train --help`."),
    (2, ["--recipe", "big"], "no recipe named 'big'; there are notes, paper, source, tiny"),
    (1, ["--device", "cpu", "--graphs"], "--graphs is of GPUs: leave it out, or use --device cuda"),
    (2, ["--device", "cpu", "--transport", "cuda-ipc"], "--transport cuda-ipc does not move cpu tensors: use rpc"),
    (2, ["--device", "gpu"], "--device gpu: there is cpu, cuda, and cuda:0, cuda:1, ..."),
    (2, ["--nonsense", "1"], "No such option.* See `alexnet train --help`."),
])  # fmt: skip
def test_a_mistake_is_told_once_by_all_processes(shards, tmp_path, processes, options, told):
    towers = Towers(shards, tmp_path / "run", *options, processes=processes, restarts=5)
    output = towers.output()
    assert towers.process.returncode == 2, output
    assert re.fullmatch(f"alexnet: {told}\n", output), output
    assert not (tmp_path / "run").exists()


def test_one_process_too_many_under_torchrun(torchrun, shards, tmp_path):
    done = torchrun(3, *alexnet("train", shards, tmp_path / "run"), check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("alexnet: ")]
    assert done.returncode and told == ["alexnet: 3 processes: the network has two towers, so start 1 or an "
                                        "even number (torchrun --nproc-per-node), or train --whole"]


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_resume(shards, finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    fails_with("no checkpoint there yet", "evaluate", run, shards)
    Towers(shards, run, "--resume").check()
    assert_same(weights(finished), weights(run))


# Two processes started by hand, for what torchrun itself would hide.


@pytest.fixture
def by_hand(shards, tmp_path, free_port):
    """Start tower `rank` of a pair with these options of `train`; all are killed at the end of the test."""
    started = []

    def start(rank: int, *options) -> subprocess.Popen:
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
        arguments = alexnet("train", shards, tmp_path / "run", "--recipe", "tiny", "--epochs", "50", *options)
        started.append(subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_workers_end_with_a_launcher_that_is_killed_while_they_start(shards, tmp_path):
    """They learn of it before they import torch, which takes seconds, or as soon as they ask who their parent is."""
    towers = Towers(shards, tmp_path / "run")
    deadline = time.monotonic() + 60
    while len(workers := children_of(towers.process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    towers.process.kill()
    assert len(workers) == 2
    towers.output(timeout_s=30)  # ends when nobody holds the pipe any more


@pytest.mark.parametrize("killed, transport", [(0, "rpc"), (1, "rpc"), (1, "gloo")])
def test_a_peer_that_dies_ends_the_other_with_one_line(by_hand, tmp_path, transport, killed):
    towers = [by_hand(rank, "--transport", transport, "--timeout", 60) for rank in (0, 1)]
    wait_for_steps(tmp_path / "run")
    towers[killed].kill()
    output = towers[1 - killed].communicate(timeout=20)[0]
    assert towers[1 - killed].returncode == 1
    assert re.fullmatch(r"alexnet: (the other tower|another process) died.*\n", output), output


def test_a_peer_that_hangs_ends_the_other_within_the_time_out(by_hand, tmp_path):
    towers = [by_hand(rank, "--timeout", 5) for rank in (0, 1)]
    wait_for_steps(tmp_path / "run")
    towers[1].send_signal(signal.SIGSTOP)
    output = towers[0].communicate(timeout=25)[0]
    assert towers[0].returncode == 1
    assert re.fullmatch(r"alexnet: the other tower sent nothing for 5 s .*\n", output), output


def test_towers_that_see_different_images_stop(torchrun, shards, tmp_path):
    done = torchrun(2, "other_images.py", "train", shards, tmp_path / "run", "--recipe", "tiny", check=False)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("alexnet: ")]
    assert len(told) == 1 and told[0].startswith("alexnet: step 1: the two towers were given different images")


def test_towers_started_differently_are_told_apart(by_hand, tmp_path):
    towers = [by_hand(rank, "--seed", rank) for rank in (0, 1)]
    outputs = [tower.communicate(timeout=60)[0] for tower in towers]
    assert [tower.returncode for tower in towers] == [2, 2]
    assert outputs[0] == "alexnet: the processes were started differently: seed (0 in process 0, 1 in process 1)\n"
    assert not (tmp_path / "run").exists()
