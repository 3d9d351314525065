"""Runs of two towers under launch/train.sh, as a user has them, and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import ROOT
from safetensors.torch import load_file

STEPS = 25  # of 2 epochs of 15: a resumed part crosses the end of an epoch


def alexnet(*arguments) -> list[str]:
    return ["-m", "launch.cli", *map(str, arguments)]


class Towers:
    """A run of `alexnet train` under launch/train.sh, in a process group of its own."""

    def __init__(self, shards, run, *options, processes: int = 2, restarts: int = 0):
        command = ["bash", str(ROOT / "launch/train.sh"), str(shards), str(run), "--recipe", "tiny", "--epochs", "2",
                   "--steps", str(STEPS), "--threads", "1", *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        start_new_session=True,
                                        env={**os.environ, "PROCESSES": str(processes), "PYTHON": sys.executable,
                                             "RESTARTS": str(restarts)})

    def workers(self) -> list[int]:
        return children_of(self.process.pid)

    def output(self, timeout_s: float = 180) -> str:
        try:
            return self.process.communicate(timeout=timeout_s)[0]
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def check(self) -> None:
        output = self.output()
        assert self.process.returncode == 0, output

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Return the whole network's tensors of a checkpoint, read without this project's code."""
    files = sorted((run / "checkpoints" / f"step-{step:09d}").glob("*.safetensors"))
    parts = [load_file(file) for file in files]
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance * float(tensor.abs().max()), msg=name)


def wait_for_steps(run: Path) -> None:
    deadline = time.monotonic() + 90
    while not (run / "log.jsonl").exists() or '"steps"' not in (run / "log.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
