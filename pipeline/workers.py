"""Worker processes for one function, each behind a pipe of its own.

`concurrent.futures` lets its processes share one queue: when one is killed while it writes a large result,
the others and the parent wait for ever. Here the pipe of a killed process ends, and the call that waits on
it fails. So does a worker's read when the parent has been killed, which then ends the worker.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


class WorkerLost(RuntimeError):
    """A worker process could not be started, or ended before it gave its result."""


class Workers:
    """A context manager; whatever happens inside it, no process is left afterwards.

    `function`, its arguments and results must be picklable, and so must what it raises.
    """

    def __init__(self, number: int, function: Callable[[Any], Any]):
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._free: SimpleQueue[Connection] = SimpleQueue()
        self._threads = ThreadPoolExecutor(number)  # one waits on each pipe that is in use
        # Spawned: a fork would copy the locks of threads that Arrow and others have started.
        context = multiprocessing.get_context("spawn")
        before = os.environ.get("OPENBLAS_NUM_THREADS")
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else NumPy starts a thread a core in every process
        # Ctrl-C reaches every process: the workers inherit that it is blocked, and the parent ends them.
        resource_tracker.ensure_running()  # started by the first worker, it would unblock the signal
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(number):
                ours, theirs = context.Pipe()
                self._free.put(ours)
                with theirs:  # only the worker may hold its end
                    process = context.Process(target=_work, args=(theirs, function), daemon=True)
                    process.start()
                self._processes.append(process)
        except OSError as error:
            self.__exit__()
            raise WorkerLost(f"{number} worker processes cannot be started ({error.strerror})") from None
        except BaseException:
            self.__exit__()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            if before is None:
                os.environ.pop("OPENBLAS_NUM_THREADS", None)
            else:
                os.environ["OPENBLAS_NUM_THREADS"] = before

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # it owns nothing that could be left half done
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()
        while not self._free.empty():
            self._free.get().close()

    def submit(self, argument: Any) -> Future:
        """Return the future result of `function(argument)`; it raises what that raises, or WorkerLost."""
        return self._threads.submit(self._call, argument)

    def _call(self, argument: Any) -> Any:
        connection = self._free.get()
        try:
            connection.send_bytes(pickle.dumps(argument))  # send() leaves a buffer locked where it fails
            raised, result = connection.recv()
        except (EOFError, OSError):
            raise WorkerLost("a worker process was killed, most likely for want of memory") from None
        finally:
            self._free.put(connection)
        if raised:
            raise result
        return result


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    while True:
        try:
            argument = connection.recv()
        except (EOFError, OSError):
            return  # the parent is gone
        try:
            result = False, function(argument)
        except Exception as error:
            result = True, error
        try:
            connection.send(result)
        except OSError:
            return
