"""torchrun, ending as the process that failed first ended, and without a traceback of its own.

`python -m launch.torchrun` takes torchrun's options. Workers tell their errors in one line themselves. With
--max-restarts they are started anew when one fails, unless it says that this would be in vain (launch.environment).
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from launch.environment import ENDING, LAUNCHER, allow_open_files
from launch.stopping import IMPATIENT_S
from model.errors import reason

PREFIX, LOCK = "alexnet-torchrun-", "lock"


def main() -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # as in launch.cli, before torch is imported
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from launch.errors import STOPPED, RunFailed, UserError
    from launch.loopback import keep_agents_on_loopback
    from launch.unpickling import data_alone_between_agents

    try:
        keep_agents_on_loopback()
        data_alone_between_agents()
        allow_open_files()
    except (RunFailed, UserError) as error:
        print(f"alexnet: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RunFailed) else 2)
    api._terminate_process_handler = _asked_once(api._terminate_process_handler)
    LocalElasticAgent._monitor_workers = _telling_signals(LocalElasticAgent._monitor_workers)
    os.environ[LAUNCHER] = str(os.getpid())
    # Or the processes of all attempts would meet in one store, and find there what those before them have left.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: torchrun would handle it all the same
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    logging.disable(logging.CRITICAL)  # torchrun's agent would add lines of its own to those of the workers
    with _folder() as folder:
        ending = folder / "ending"
        os.environ[ENDING] = str(ending)
        try:
            options = run.parse_args(["--log-dir", str(folder), *sys.argv[1:]])
            run.config_from_args(options)
        except (ValueError, AssertionError) as error:
            _refuse(error)
        try:
            run.run(options)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
        except ValueError as error:  # of the rendezvous
            _refuse(error)
        except (KeyboardInterrupt, SignalException, RendezvousError) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left to be done takes no time
            code, *told = _words(ending)
            if told:
                sys.exit(int(code))
            if isinstance(error, RendezvousError):
                print(f"alexnet: the hosts of this job do not meet, or no more ({reason(error)}): are all of them "
                      "running, and can they reach --rdzv-endpoint?", file=sys.stderr)
                sys.exit(1)
            stopped_by = getattr(error, "sigval", signal.SIGINT)
            goes_on = stopped_by == signal.SIGTERM and code == str(STOPPED)
            print(f"alexnet: stopped by {_name(stopped_by)}"
                  f"{'; there is a checkpoint: go on with --resume' if goes_on else ''}", file=sys.stderr)
            sys.exit(STOPPED if goes_on else 128 + stopped_by)


def _words(ending: Path) -> list[str]:
    """Return what the processes have said of the job's end: see launch.environment.tell_ending."""
    with suppress(OSError):
        return ending.read_text().split() or [""]
    return [""]


def _telling_signals(monitor: Callable) -> Callable:
    """Have torchrun's agent say which signal ended a process, which could not say so itself, whatever comes after."""
    def monitored(agent, group):
        result = monitor(agent, group)
        for number, (rank, failure) in enumerate(result.failures.items()):  # the first one first
            # With SIGTERM torchrun ends the others.
            if failure.exitcode < 0 and (number == 0 or failure.exitcode != -signal.SIGTERM):
                print(f"alexnet: the process of rank {rank} was ended by {_name(-failure.exitcode)}", file=sys.stderr)
        return result

    return monitored


def _refuse(error: Exception) -> NoReturn:
    print(f"alexnet: torchrun does not take {' '.join(sys.argv[1:])[:200]} ({reason(error)})", file=sys.stderr)
    sys.exit(2)


def _asked_once(handle: Callable) -> Callable:
    """Have torchrun take SIGTERMs that come close together for one, as the processes do: each would cut short what it
    does for the one before."""
    asked_at = -IMPATIENT_S

    def handler(number: int, frame: object) -> None:
        nonlocal asked_at
        before, asked_at = asked_at, time.monotonic()
        if number != signal.SIGTERM or asked_at - before > IMPATIENT_S:
            handle(number, frame)

    return handler


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"


@contextmanager
def _folder() -> Iterator[Path]:
    """Give a temporary folder, and remove those of launchers that were killed."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            with open(os.open(left / LOCK, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix="alexnet-"))
    try:
        with open(folder / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Locked before others look at it.
            folder = folder.rename(place / f"{PREFIX}{os.getpid()}-{folder.name[8:]}")
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
