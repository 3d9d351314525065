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

    Nothing is recorded without a path. A run that ends before leaves a trace of what there was, or says that there was
    nothing.
    """
    if path is None:
        yield lambda: None
        return
    path.unlink(missing_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, schedule=schedule(wait=SKIPPED - 1, warmup=1, active=RECORDED, repeat=1),
                 on_trace_ready=lambda recorded: recorded.export_chrome_trace(str(path))) as recorder:
        yield recorder.step
    if not path.exists():
        print(f"alexnet: --profile records after {SKIPPED} steps, and there were not as many: no trace", file=sys.stderr)
