"""Processes that are stopped, or whose host is gone, are noticed within ten seconds, whatever the others wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

from conftest import ROOT
from torch.distributed import TCPStore
from towers_at_work import Towers, wait_for_steps

from launch import heartbeat
from launch.heartbeat import LIMIT_S, Heartbeat

PROGRAM = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from launch import heartbeat
rank, port, seconds, heartbeat.LIMIT_S = int(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:])
store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=5))
beats = heartbeat.Heartbeat(store, rank, 3)
print("begun", flush=True)
time.sleep(seconds)
beats.part()
store.add("parted", 1)
while int(store.add("parted", 0)) < 3:
    time.sleep(0.01)
time.sleep(1 if rank == 0 else 0)
"""


def start(free_port: int, *seconds: float, limit_s: float = 3) -> list[subprocess.Popen]:
    """Three processes, which part after so many seconds. Most need not wait for 7 s to see somebody silent."""
    started = []
    for rank, one in enumerate(seconds):
        started.append(subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, (rank, free_port, one, limit_s))],
                                        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "FATAL"}))
        assert started[-1].stdout.readline() == "begun\n"
    return started


def test_processes_that_part_at_different_times_end_well(free_port):
    processes = start(free_port, 5.5, 0.5, 1)
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0] and not any(error for _, error in told), told


def ended(process: subprocess.Popen, since: float, within_s: float) -> str:
    """Wait for a process that gives up; return what it said."""
    told = process.communicate(timeout=40)[1]
    assert process.returncode == 1 and time.monotonic() - since < within_s
    return told


def test_stopped_processes_end_the_others(free_port):
    processes = start(free_port, 60, 60, 60, limit_s=LIMIT_S)
    time.sleep(2)
    for process in processes[1:]:
        process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert ended(processes[0], stopped, 12) == (  # 7 to 8, and what a busy machine adds
        "alexnet: processes 1, 2 have been silent for 7 s: hanging, or stopped, or the host is gone\n")
    for process in processes[1:]:
        process.kill()
        process.communicate()


def test_the_process_with_the_store_is_stopped(free_port):
    processes = start(free_port, 60, 60, 60)
    time.sleep(2)
    processes[0].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert [ended(process, stopped, 8) for process in processes[1:]] == [
        "alexnet: process 0 has been silent for 3 s: hanging, or stopped, or the host is gone\n", ""]
    processes[0].kill()
    processes[0].communicate()


def test_a_process_that_has_an_end_of_its_own_is_left_to_it(free_port, monkeypatch):
    """It may have to tell why, after process 0 has gone."""
    store = TCPStore("127.0.0.1", free_port, is_master=True, wait_for_workers=False)
    beats = Heartbeat(TCPStore("127.0.0.1", free_port, wait_for_workers=False), 1, 2)
    store.set("beat/0", "1")  # and nothing more
    judged = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: judged.set())
    monkeypatch.setattr(heartbeat, "LIMIT_S", 3)
    beats.judge_no_more()
    assert not judged.wait(5)
    beats._judging = True
    assert judged.wait(2)
    beats.part()


def test_a_tower_is_stopped_while_the_other_waits_for_it(shards, tmp_path):
    """Far within --timeout, which is 300 s; torchrun does not wait for the stopped one either."""
    towers = Towers(shards, tmp_path / "run", "--epochs", "50", "--steps", "700")
    wait_for_steps(tmp_path / "run")
    os.kill(towers.workers()[1], signal.SIGSTOP)
    stopped = time.monotonic()
    output = towers.output(timeout_s=40)
    assert time.monotonic() - stopped < 15 and towers.process.returncode == 1
    assert "alexnet: process 1 has been silent for 7 s: hanging, or stopped, or the host is gone\n" in output
