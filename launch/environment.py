"""What torchrun and the kernel tell a process of itself; without torch, which takes seconds to import."""

from __future__ import annotations

import ctypes
import os
import re
import signal

from launch.errors import UserError


LAUNCHER = "ALEXNET_LAUNCHER"  # launch.torchrun's process: a worker whose parent is another has lost it


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step in place of returning it to the kernel.

    By default each large tensor's memory is mapped, filled with zeros page by page and given back: a quarter of the
    time of a full-width step on the CPU. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def from_environment(name: str, default: int, least: int, most: int) -> int:
    """Return a number that torchrun sets; UserError for what is none."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text) or not least <= int(text) <= most:
        raise UserError(f"the environment's {name} is {text!r}, not a number from {least} to {most}: "
                        "start with torchrun, or unset it")
    return int(text)


def rank_and_size() -> tuple[int, int]:
    """Return which of how many processes this is; (0, 1) for one alone."""
    size = from_environment("WORLD_SIZE", 1, 1, 1 << 20)
    return from_environment("RANK", 0, 0, size - 1), size


def local_size() -> int:
    """Return the number of processes on this host."""
    return from_environment("LOCAL_WORLD_SIZE", 1, 1, 1 << 20)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the one that started it, process `parent`, ends, by whatever."""
    set_parent_death_signal = 1  # of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_torchrun() -> None:
    """Under torchrun, have the kernel kill this process when torchrun is killed, which then cannot end it itself.

    On Ctrl-C, too, it ends at once: what is on the disk is whole at any moment, and torchrun says that it was stopped.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.environ.get(LAUNCHER, "")
    die_with_parent(int(launcher) if launcher.isdecimal() else None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
