"""Shared by all tests: `torchrun` starts a program in several processes, with a time-out and free ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "programs"


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def torchrun():
    """Run `torchrun --nproc-per-node processes program...` and return the finished process, output as text.

    `program` is a script of tests/programs or "-m", module. A run longer than `timeout_s` fails the test.
    """

    def run(processes: int, *program: str, timeout_s: float = 120, check: bool = True):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={processes}", *map(str, program)]
        if program[0] != "-m":
            command[-len(program)] = str(PROGRAMS / program[0])
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """480 training and 50 validation images of the sample: 15 steps an epoch."""
    folder = tmp_path_factory.mktemp("sample")
    for arguments in (["sample", folder / "archives", "--train-per-class", "48", "--val-per-class", "5"],
                      ["preprocess", folder / "archives", folder / "shards"],
                      ["preprocess", folder / "archives", folder / "raw", "--store", "raw"]):
        done = subprocess.run([sys.executable, "-m", "launch.cli", *map(str, arguments)], capture_output=True,
                              text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    return folder / "shards"


@pytest.fixture(scope="session")
def finished(shards, tmp_path_factory) -> Path:
    """A run of two towers, STEPS steps, left alone."""
    from towers_at_work import Towers  # which imports this module

    run = tmp_path_factory.mktemp("runs") / "two"
    Towers(shards, run).check()
    return run
