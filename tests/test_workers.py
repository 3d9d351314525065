"""Worker processes: a lost one fails its call and only that, what a function raises comes back, none is left over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from pipeline.errors import DataError
from pipeline.workers import WorkerLost, Workers


def act(order: str) -> str:
    """What the processes do."""
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "die while writing":  # a result that the pipe cannot take at once
        threading.Thread(target=lambda: (time.sleep(0.05), os.kill(os.getpid(), signal.SIGKILL))).start()
        return "x" * (1 << 30)
    if order == "sleep":
        time.sleep(60)
    if order == "refuse":
        raise DataError("no")
    return order.upper()


@pytest.mark.parametrize("order", ["die", "die while writing"])
def test_a_lost_worker_fails_its_call_and_only_that(order):
    with Workers(2, act) as workers:
        lost, other = workers.submit(order), workers.submit("echo")
        assert other.result(timeout=30) == "ECHO"
        with pytest.raises(WorkerLost, match="was killed"):
            lost.result(timeout=30)
    assert not multiprocessing.active_children()


def test_leaving_does_not_wait_for_busy_workers():
    with Workers(2, act) as workers:
        results = [workers.submit(order) for order in ("echo", "sleep", "sleep", "sleep")]
        assert results[0].result(timeout=30) == "ECHO"
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert not multiprocessing.active_children()


def test_what_the_function_raises_comes_back_and_the_worker_goes_on():
    with Workers(1, act) as workers:
        with pytest.raises(DataError, match="^no$"):
            workers.submit("refuse").result(timeout=30)
        assert workers.submit("echo").result(timeout=30) == "ECHO"
