"""A trace of a few training steps, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, RECORDED = 6, 5  # steps; the first ones are not like the others (model.captured)


@contextmanager
def profiled(path: Path | None) -> Iterator[Callable[[], None]]:
    """Yield what is to be called after every step; write the trace to `path` after the last recorded one.

    Nothing is recorded without a path. Of a run that ends before there is no trace, which is said.
    """
    if path is None:
        yield lambda: None
        return
    path.unlink(missing_ok=True)
    steps = 0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, schedule=schedule(wait=SKIPPED - 1, warmup=1, active=RECORDED, repeat=1),
                 on_trace_ready=lambda recorded: recorded.export_chrome_trace(str(path))) as recorder:

        def end_step() -> None:
            nonlocal steps
            steps += 1
            recorder.step()

        yield end_step
    if steps < SKIPPED + RECORDED:
        path.unlink(missing_ok=True)
        print(f"alexnet: --profile takes {SKIPPED + RECORDED} steps, and there were {steps}: no trace", file=sys.stderr)
