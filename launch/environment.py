"""What torchrun and the kernel tell a process of itself; without torch, which takes seconds to import."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

from launch.errors import STOPPED, UserError


LAUNCHER = "ALEXNET_LAUNCHER"  # launch.torchrun's process: a worker whose parent is another has lost it
WANTED_OPEN_FILES, LEAST_OPEN_FILES = 4096, 256
ENDING = "ALEXNET_ENDING"  # a file in which a worker tells launch.torchrun the exit code that the job is to have


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step in place of returning it to the kernel.

    By default each large tensor's memory is mapped, filled with zeros page by page and given back: a quarter of the
    time of a full-width step on the CPU. What is kept is kept in two places, not in one for each of the threads that
    come and go with checkpoints and loaders. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(arena_max, 2)


def allow_open_files() -> None:
    """Raise this process's limit of open files, which is low in many shells; UserError where it stays too low."""
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    if limit != infinite and limit < WANTED_OPEN_FILES:
        limit = WANTED_OPEN_FILES if highest == infinite else min(WANTED_OPEN_FILES, highest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, highest))
        if limit < LEAST_OPEN_FILES:
            raise UserError(f"only {limit} open files are allowed: raise that (ulimit -n 4096)")


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


def job() -> str | None:
    """Return the name of the torchrun job that this process is of, the same after it has been started anew; None where
    there is none, or a name that every job has."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in (None, "none"):
        return None
    return name


def restarts() -> int:
    """Return how often torchrun has started this job's processes anew, as far as this host's torchrun knows."""
    return from_environment("TORCHELASTIC_RESTART_COUNT", 0, 0, 1 << 20)


def most_restarts() -> int:
    """Return how often torchrun would start this job's processes anew."""
    return from_environment("TORCHELASTIC_MAX_RESTARTS", 0, 0, 1 << 20)


def local_size() -> int:
    """Return the number of processes on this host."""
    return from_environment("LOCAL_WORLD_SIZE", 1, 1, 1 << 20)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the one that started it, process `parent`, ends, by whatever."""
    set_parent_death_signal = 1  # of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def tell_ending(code: int | None, told: bool = True) -> None:
    """Under launch.torchrun, name the exit code that the job has if it is stopped now; None: the usual one. `told`:
    the user knows why."""
    with suppress(KeyError, OSError):
        Path(os.environ[ENDING]).write_text("" if code is None else f"{code} told" if told else str(code))


def tell_checkpoint() -> None:
    """Say that a job that is stopped now may be gone on with. Of a host's processes the first one says so."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tell_ending(STOPPED, told=False)


def end_job(code: int) -> None:
    """Where launch.torchrun would start the job anew, to fail in the same way, have it end with `code` instead."""
    if os.environ.get(LAUNCHER) == str(os.getppid()) and restarts() < most_restarts():
        tell_ending(code)
        os.kill(int(os.environ[LAUNCHER]), signal.SIGTERM)
        time.sleep(60)  # torchrun ends this process


def end_stopped_siblings() -> None:
    """Kill the processes of launch.torchrun here that are stopped (SIGSTOP): it waits in vain for them to end."""
    with suppress(OSError, ValueError):
        parent = os.getppid()
        if os.environ.get(LAUNCHER) != str(parent):
            return
        for pid in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                os.kill(pid, signal.SIGKILL)


def die_with_torchrun() -> None:
    """Under torchrun, have the kernel kill this process when torchrun is killed, which then cannot end it itself.

    On Ctrl-C, too, it ends at once: what is on the disk is whole at any moment, and torchrun says that it was stopped.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.environ.get(LAUNCHER, "")
    die_with_parent(int(launcher) if launcher.isdecimal() else None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
