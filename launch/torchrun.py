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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.environment import ENDING, LAUNCHER

PREFIX = "alexnet-torchrun-"


def main() -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # as in launch.cli, before torch is imported
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from launch.errors import RunFailed
    from launch.loopback import keep_agents_on_loopback
    from launch.unpickling import data_alone_between_agents

    try:
        keep_agents_on_loopback()
        data_alone_between_agents()
    except RunFailed as error:
        sys.exit(f"alexnet: {error}")
    os.environ[LAUNCHER] = str(os.getpid())
    # Or the processes of all attempts would meet in one store, and find there what those before them have left.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    logging.disable(logging.CRITICAL)  # torchrun's agent would add lines of its own to those of the workers
    with _folder() as folder:
        ending = folder / "ending"
        os.environ[ENDING] = str(ending)
        try:
            run.main(["--log-dir", str(folder), *sys.argv[1:]])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                print(f"alexnet: the process of rank {rank} was ended by {signal.Signals(-failure.exitcode).name}",
                      file=sys.stderr)
            sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
        except (KeyboardInterrupt, SignalException) as error:
            with suppress(OSError, ValueError):
                sys.exit(int(ending.read_text()))
            stopped_by = getattr(error, "sigval", signal.SIGINT)
            print(f"alexnet: stopped by {signal.Signals(stopped_by).name}", file=sys.stderr)
            sys.exit(128 + stopped_by)


@contextmanager
def _folder() -> Iterator[Path]:
    """Give a temporary folder, and remove those of launchers that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), open(left / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder, open(Path(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)


if __name__ == "__main__":
    main()
