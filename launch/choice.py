"""Which device, transport and precision a command is to use, of those that are to be had here.

Nothing is begun on a GPU: a command that only starts others must not hold memory of theirs.
"""

from __future__ import annotations

import re

import torch

from launch.environment import from_environment
from launch.errors import UserError
from launch.precision import choose_precision


def choose(device: str | None, transport: str, precision: str | None, processes: int) -> tuple[torch.device, str]:
    """Return device and precision; UserError where they, or `transport` for so many local processes, cannot be."""
    chosen = device_named(device)
    if transport in {"cuda": ["gloo"], "cpu": ["nccl", "cuda-ipc"]}[chosen.type]:
        raise UserError(f"--transport {transport} does not move {chosen.type} tensors: use rpc")
    if transport == "nccl" and torch.cuda.device_count() < processes:
        raise UserError("--transport nccl needs a GPU for each process: use rpc")
    return chosen, choose_precision(precision, chosen)


def graphs_by_default(device: torch.device, transport: str, processes: int) -> bool:
    """Whether training steps are replayed from CUDA graphs: on a GPU, of one process, or of two whose exchange takes
    less time than it saves."""
    return device.type == "cuda" and (processes == 1 or transport == "cuda-ipc")


def device_named(name: str | None) -> torch.device:
    """Return this process's device, for --device's "cpu", "cuda", "cuda:N" or None; UserError for others."""
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: there is cpu, cuda, and cuda:0, cuda:1, ...")
    if name == "cpu" or name is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no CUDA device that torch can use; use --device cpu")
    if name in (None, "cuda"):  # a GPU a process; where there are fewer they share
        name = f"cuda:{from_environment('LOCAL_RANK', 0, 0, 1 << 20) % torch.cuda.device_count()}"
    if torch.device(name).index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return torch.device(name)
