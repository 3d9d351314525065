"""torchrun, ending as the process that failed first ended, and without a traceback of its own.

`python -m launch.torchrun` takes torchrun's options. Workers tell their errors in one line themselves.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from launch.environment import LAUNCHER


def main() -> None:
    os.environ[LAUNCHER] = str(os.getpid())
    logging.disable(logging.CRITICAL)  # torchrun's agent would add lines of its own to those of the workers
    try:
        with tempfile.TemporaryDirectory(prefix="torchrun-") as logs:  # torchrun's own would be left behind
            run.main(["--log-dir", logs, *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"alexnet: the process of rank {rank} was ended by {signal.Signals(-failure.exitcode).name}",
                  file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except (KeyboardInterrupt, SignalException) as error:
        stopped_by = getattr(error, "sigval", signal.SIGINT)
        print(f"alexnet: stopped by {signal.Signals(stopped_by).name}", file=sys.stderr)
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    main()
