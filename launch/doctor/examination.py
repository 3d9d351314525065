"""All checks, one after the other; none can keep another from being made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from launch.doctor import decoding, exchange, folders, gpus, host, network, software
from launch.doctor.finding import INSTALL, WRONG, Finding
from launch.errors import UserError
from model.errors import reason
from pipeline.errors import DataError

Check = Callable[[], Finding | None]  # None: there is nothing here to be looked at


def checks(quick: bool, run: Path | None, shards: str | None) -> Iterator[tuple[str, Check]]:
    """Yield the name of each check and the check; `quick`: those that start no process and take less than a second."""
    yield "Python", software.python
    yield "torch", software.torch
    yield "packages", software.packages
    yield "DALI", software.dali
    yield "CPU decoding", decoding.on_cpu
    yield "GPUs", partial(gpus.gpus, with_driver=not quick)
    yield "GPU to GPU", gpus.links
    yield "Triton", gpus.triton
    yield "cores", host.cores
    yield "memory", host.memory
    yield "shared memory", host.shared_memory
    yield "open files", host.open_files
    yield "clock", host.clock
    yield "loopback", network.loopback
    yield "host name", network.host_name
    if run is not None:
        yield "RUN", partial(folders.run, run)
    if shards is not None:
        yield "SHARDS", partial(folders.shards, shards, thorough=not quick)
    if quick:
        return
    yield "RPC", exchange.rpc
    yield "CUDA IPC", exchange.cuda_ipc
    # Last: this process then holds a part of a GPU, which may take one process at a time.
    yield "GPU decoding", decoding.on_gpu


def examine(quick: bool, run: Path | None, shards: str | None) -> Iterator[tuple[str, Finding]]:
    """Make every check and yield what it found, those that do not apply here left out."""
    for name, check in checks(quick, run, shards):
        finding = found_by(check)
        if finding is not None:
            yield name, finding


def found_by(check: Check) -> Finding | None:
    """Make one check; whatever it raises is what it found."""
    try:
        return check()
    except (UserError, DataError) as error:  # "what, where; what to do"
        found, _, mend = str(error).partition("; ")
        return Finding(WRONG, found, mend)
    except ImportError as error:
        return Finding(WRONG, f"cannot be looked at: {reason(error)}", INSTALL)
    except Exception as error:  # of any library, on a machine that may be broken in any way
        return Finding(WRONG, f"cannot be looked at: {type(error).__name__}: {reason(error)}")
