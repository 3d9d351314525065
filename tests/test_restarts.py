"""Whatever ends a process, the run goes on from its last checkpoint and ends with the same weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROGRAMS, ROOT
from towers_at_work import STEPS, Towers, assert_same, wait_for_steps, weights

from launch.environment import tell_checkpoint, tell_ending
from launch.errors import STOPPED
from launch.runlog import read_log

FIRST = 11  # the step of the first checkpoint, with one at every look


def disturbed(shards, run: Path, *options, processes: int = 2) -> Towers:
    """Start a run, and return when it has its first checkpoint."""
    towers = Towers(shards, run, "--checkpoint-minutes", "0", *options, processes=processes, restarts=3)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / f"step-{FIRST:09d}").exists():
        assert time.monotonic() < deadline and towers.process.poll() is None, towers.output()
        time.sleep(0.005)
    return towers


@pytest.mark.parametrize("rank, number", [(0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGTERM)])
def test_a_process_that_is_hit_is_started_anew(shards, finished, tmp_path, rank, number):
    run = tmp_path / "run"
    towers = disturbed(shards, run, "--timeout", "5")
    os.kill(towers.workers()[rank], number)
    output = towers.output(timeout_s=100)
    assert towers.process.returncode == 0, output
    (resumed,) = [record for record in read_log(run / "log.jsonl") if record["event"] == "resume"]
    assert f"\ngoing on from step {resumed['step']} of 30 (restart 1 of 3)\n" in f"\n{output}", output
    assert "Traceback" not in output
    ended = re.findall("alexnet: the process of rank (.) was ended by (.*)", output)
    assert ended == ([] if number == signal.SIGTERM else [(str(rank), "SIGKILL")]), output
    assert FIRST <= resumed["step"] <= STEPS and 0 <= resumed["repeats"] <= STEPS - resumed["step"]
    if number == signal.SIGTERM:  # it was asked: what it had done is in the checkpoint
        assert resumed["repeats"] == 0
    assert read_log(run / "log.jsonl")[-1]["repeated"] == resumed["repeats"]
    assert_same(weights(finished), weights(run))


def test_replicas_that_are_hit_are_started_anew(shards, tmp_path):
    """Of the whole network, three, of whose gradients the order of sums counts."""
    runs, options = [tmp_path / "alone", tmp_path / "killed"], ["--batch", 30, "--whole"]
    Towers(shards, runs[0], *options, processes=3).check()
    towers = disturbed(shards, runs[1], *options, processes=3)
    os.kill(towers.workers()[-1], signal.SIGKILL)
    output = towers.output()
    assert towers.process.returncode == 0 and "Traceback" not in output and "Warning" not in output, output
    assert [record["event"] for record in read_log(runs[1] / "log.jsonl")].count("resume") == 1
    assert_same(weights(runs[0]), weights(runs[1]))


@pytest.mark.parametrize("processes, to_all", [(1, False), (2, True)])
def test_a_scheduler_that_wants_the_machine_back(shards, finished, tmp_path, processes, to_all):
    """SIGTERM to torchrun, which passes it on, or to every process: a checkpoint, and an exit code that says so."""
    run = tmp_path / "run"
    towers = disturbed(shards, run, processes=processes)
    for pid in towers.workers() if to_all else []:
        os.kill(pid, signal.SIGTERM)
    for _ in range(5):  # one request, however often it is made in some seconds
        towers.process.terminate()
        time.sleep(0.02)
    output = towers.output(timeout_s=30)
    assert towers.process.returncode == STOPPED, output
    step = read_log(run / "log.jsonl")[-1]["step"]
    assert read_log(run / "log.jsonl")[-1]["event"] == "stopped" and FIRST <= step <= STEPS
    assert output.endswith(f"alexnet: stopped by SIGTERM at step {step} of 30, of which there is a checkpoint: go on "
                           "with --resume\n"), output
    if processes == 2:
        again = Towers(shards, run, "--resume")
        assert f"going on from step {step} of 30\n" in again.output() and again.process.returncode == 0
        assert_same(weights(finished), weights(run))


def test_a_process_alone_is_stopped_in_the_same_way(shards, tmp_path):
    command = [sys.executable, "-m", "launch.cli", "train", str(shards), str(tmp_path / "run"), "--recipe", "tiny",
               "--epochs", "50"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    wait_for_steps(tmp_path / "run")
    process.terminate()
    told = process.communicate(timeout=30)[1]
    assert process.returncode == STOPPED and told.splitlines()[-1].startswith("alexnet: stopped by SIGTERM at step ")


def started(program: str, *words) -> subprocess.CompletedProcess:
    """Run two processes of a program that stands in for `alexnet`, to be started anew five times."""
    command = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=5",
               str(PROGRAMS / program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_what_would_fail_again_is_not_tried_again(shards, tmp_path):
    done = started("wild.py", "train", shards, tmp_path / "run", "--recipe", "tiny")
    told = [line for line in done.stderr.splitlines() if line.startswith("alexnet: ")]
    assert done.returncode == 1 and len(told) == 1 and "are not finite" in told[0], done.stderr
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert [record["event"] for record in records].count("resume") == 0
    assert records[-1]["event"] == "failed" and "are not finite" in records[-1]["reason"]


def test_a_process_that_dies_before_there_is_a_log_is_started_anew(shards, tmp_path):
    done = started("dies_early.py", "train", shards, tmp_path / "run", "--recipe", "tiny", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "alexnet: the process of rank 1 was ended by SIGKILL\n" in done.stderr
    assert "checkpoints: no checkpoint there, so from the start (restart 1 of 5)\n" in done.stderr
    assert [record["event"] for record in read_log(tmp_path / "run" / "log.jsonl")][0::3] == ["start", "end"]


@pytest.mark.parametrize("change, told", [("remove", "gone since it was opened"), ("cut", "changed since")])
def test_a_shard_that_is_touched_under_the_run(shards, tmp_path, change, told):
    """Nothing that was learned of it gets into a checkpoint. Memory of a file that was cut is gone: that is seen before
    the next checkpoint, or it ends a process (SIGBUS), and what is started anew sees why."""
    folder, run = Path(shutil.copytree(shards, tmp_path / "shards")), tmp_path / "run"
    towers = Towers(folder, run, "--checkpoint-minutes", "0", restarts=3)
    wait_for_steps(run)
    shard = folder / "train-00000.arrow"
    if change == "remove":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 4)
    output = towers.output(timeout_s=100)
    lines = [line for line in output.splitlines() if line.startswith("alexnet: ") and "train-00000.arrow" in line]
    assert towers.process.returncode == 2 and len(lines) == 1 and told in lines[0], output


def test_a_stopped_sibling_is_ended(tmp_path):
    parent = ("import os, subprocess, sys, signal, time\n"
              "os.environ['ALEXNET_LAUNCHER'] = str(os.getpid())\n"
              "stopped = subprocess.Popen(['sleep', '60']); asleep = subprocess.Popen(['sleep', '60'])\n"
              "os.kill(stopped.pid, signal.SIGSTOP)\n"
              "os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)\n"
              "program = 'from launch.environment import end_stopped_siblings; end_stopped_siblings()'\n"
              "subprocess.run([sys.executable, '-c', program])\n"
              "print(stopped.wait(10), asleep.poll()); asleep.kill()")
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "-9 None\n", done.stderr


def test_a_launcher_ends_with_the_code_that_it_was_told(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEXNET_ENDING", str(tmp_path / "ending"))
    tell_ending(STOPPED)
    assert (tmp_path / "ending").read_text() == "75 told"
    monkeypatch.setenv("LOCAL_RANK", "1")
    tell_checkpoint()
    assert (tmp_path / "ending").read_text() == "75 told"
    monkeypatch.setenv("LOCAL_RANK", "0")
    tell_checkpoint()
    assert (tmp_path / "ending").read_text() == "75"
    tell_ending(None)
    assert (tmp_path / "ending").read_text() == ""


def test_folders_of_killed_launchers_are_cleared_away(shards, tmp_path):
    places = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHON": sys.executable}
    (tmp_path / "tmp").mkdir()
    command = ["bash", str(ROOT / "launch/train.sh"), str(shards), str(tmp_path / "run"), "--recipe", "tiny"]
    killed = subprocess.Popen(command, env=places, stderr=subprocess.DEVNULL)
    wait_for_steps(tmp_path / "run")
    killed.kill()
    killed.wait()
    assert len(list((tmp_path / "tmp").glob("alexnet-torchrun-*"))) == 1
    done = subprocess.run([*command, "--nonsense"], env=places, capture_output=True)
    left = {path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor_")}
    assert done.returncode == 2 and not left  # but torch's cache


def test_a_job_that_is_killed_in_mid_epoch_ends_the_same_when_resumed(shards, finished, tmp_path):
    """Steps done twice are counted exactly, though the log has a line for ten of them only."""
    run = tmp_path / "run"
    towers = disturbed(shards, run)
    while int((run / "step").read_bytes().split()[0]) < 18:
        time.sleep(0.001)
    towers.kill()
    reached = int((run / "step").read_bytes().split()[0])
    Towers(shards, run, "--resume").check()
    (resumed,) = [record for record in read_log(run / "log.jsonl") if record["event"] == "resume"]
    assert FIRST <= resumed["step"] < STEPS and resumed["step"] + resumed["repeats"] == reached
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["repeated"] == resumed["repeats"]
    assert_same(weights(finished), weights(run))
