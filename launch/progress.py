"""Progress bars for people, on stderr, and nothing where that is no terminal."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from pipeline.manifest import Manifest, check_files


class SplitBars:
    """One bar a split, with rate and time left: call it with (images done, images expected or None, split)."""

    def __init__(self):
        self._bar, self._split = None, None

    def __call__(self, done: int, total: int | None, split: str) -> None:
        if split != self._split:
            self._finish()
            self._split = split
            self._bar = tqdm(total=total, unit="image", desc=split, disable=None, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> SplitBars:
        return self

    def __exit__(self, *_) -> None:
        self._finish()


def check_with_bar(shards: Path, manifest: Manifest, hashes: bool = True) -> None:
    """`check_files` of all files; DataError names the first that is not what it was."""
    files = manifest.files()
    with tqdm(total=sum(file.bytes for file in files), unit="B", unit_scale=True, desc="checking shards",
              disable=None, leave=False, dynamic_ncols=True) as bar:
        check_files(shards, files, hashes, bar.update)
