"""Cores, memory, limits and clock."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from launch.doctor.cgroup import limits
from launch.doctor.finding import NOTE, OK, WRONG, Finding, gib
from launch.doctor.gpus import usable
from launch.environment import LEAST_OPEN_FILES, WANTED_OPEN_FILES, usable_cores

GIB = 1 << 30
MEMORY_OF_NOTES, LEAST_MEMORY = 3 * GIB, GIB  # a step of the whole network on a CPU took 2.7 GB at its peak
SHARED_MEMORY, LEAST_SHARED_MEMORY = GIB, 64 << 20  # docker gives 64 MiB
OPEN_FILES = 1024  # ImageNet has 326 shards; then come sockets, libraries and the log
RELEASED = 2026


def cores() -> Finding:
    return judge_cores(usable_cores(), os.cpu_count(), limits().cores)


def judge_cores(usable: int, of_host: int, limit: float) -> Finding:
    """`limit` is the container's, in cores' time."""
    found = f"{usable}" if usable == of_host else f"{usable} of {of_host}"
    if limit < usable:
        share = max(1, int(limit / 2))
        return Finding(NOTE, f"{found}, but this container may use only the time of {limit:g}",
                       f"give each of two processes --threads {share}; or raise the limit (docker run --cpus)")
    if usable == 1:
        return Finding(NOTE, f"{found}: two towers and their data take turns", "two or more are faster")
    return Finding(OK, found)


def memory() -> Finding:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    return judge_memory(total, available, limits().memory_bytes)


def judge_memory(total: int, available: int, limit: float) -> Finding:
    """Bytes; `limit` is the container's."""
    found, mend = f"{gib(total)}, {gib(available)} available", "end other programs"
    if limit < total:
        found = f"{found}; this container may use {gib(limit)}"
        mend = f"{mend}, or raise the limit (docker run --memory)"
    usable = min(available, limit)
    if usable < LEAST_MEMORY:
        return Finding(WRONG, found, f"{mend}: training takes 1 GiB at the very least")
    if usable < MEMORY_OF_NOTES:
        return Finding(NOTE, found, f"{mend}: recipe `notes` takes about 3 GiB on a CPU; `tiny` takes less")
    return Finding(OK, found)


def shared_memory() -> Finding:
    try:
        about = os.statvfs("/dev/shm")
    except OSError as error:
        return judge_shared_memory(0, f"no /dev/shm ({error.strerror})", usable())
    free = about.f_bavail * about.f_frsize
    return judge_shared_memory(free, f"{gib(free)} free in /dev/shm", usable())


def judge_shared_memory(free: int, found: str, on_gpu: bool) -> Finding:
    if free < LEAST_SHARED_MEMORY and on_gpu:
        return Finding(WRONG, found, "docker run --shm-size=2g, or: sudo mount -o remount,size=2g /dev/shm")
    if free < SHARED_MEMORY:
        return Finding(NOTE, f"{found}; processes on GPUs may need more",
                       "docker run --shm-size=2g, or: sudo mount -o remount,size=2g /dev/shm")
    return Finding(OK, found)


def open_files() -> Finding:
    unlimited = float("inf")
    return judge_open_files(*(unlimited if count == resource.RLIM_INFINITY else count
                              for count in resource.getrlimit(resource.RLIMIT_NOFILE)))


def judge_open_files(limit: float, may_be_raised_to: float) -> Finding:
    """Of the limit that training has: it raises its own as far as it may."""
    limit = max(limit, min(may_be_raised_to, WANTED_OPEN_FILES))
    found = f"{limit:.0f} a process"
    if limit >= OPEN_FILES:
        return Finding(OK, found)
    state = WRONG if limit < LEAST_OPEN_FILES else NOTE
    return Finding(state, f"{found}: ImageNet's shards alone are 326 files",
                   "raise it in /etc/security/limits.conf; docker run --ulimit nofile=4096")


def clock() -> Finding:
    return judge_clock(time.time())


def judge_clock(now_s: float) -> Finding:
    """`now_s` are seconds since 1970."""
    found = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s))
    if time.gmtime(now_s).tm_year < RELEASED:
        return Finding(NOTE, f"{found}, which is before this program was written",
                       "set it: logs would be misdated, and object stores turn such requests down")
    return Finding(OK, found)
