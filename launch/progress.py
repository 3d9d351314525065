"""Progress bars for people, on stderr, and nothing where that is no terminal."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from pipeline.cache import local_shards


class TaskBars:
    """One bar a task, with rate and time left: call it with (done, to be done or None, name of the task)."""

    def __init__(self, shown: bool = True, unit: str = "image"):
        self._bar, self._task, self._unit = None, None, unit
        self._disable = None if shown else True

    def __call__(self, done: int, total: int | None, task: str) -> None:
        if task != self._task:
            self._finish()
            self._task = task
            # What was done before this run began does not count for the rate.
            self._bar = tqdm(total=total, initial=done, unit=self._unit, unit_scale=self._unit == "B", desc=task,
                             disable=self._disable, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> TaskBars:
        return self

    def __exit__(self, *_) -> None:
        self._finish()


def shards_here(location: str, cache: Path | None) -> Path:
    """`local_shards`, with a bar while they are fetched."""
    with TaskBars(unit="B") as bars:
        return local_shards(location, cache, lambda done, total: bars(done, total, "fetching shards"))
