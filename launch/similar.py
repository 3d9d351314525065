"""The training images whose last hidden layer is nearest to a picture's (section 6.1, figure 4).

An index is one row of half-precision activations an image, memory-mapped and searched whole: the result is exact.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from launch.errors import UserError
from launch.predict import seen
from launch.trained import Trained, open_trained
from launch.world import World
from pipeline.compiled import compiled
from pipeline.files import creating, locked, write_durably
from pipeline.manifest import Manifest, check_files, load_manifest
from pipeline.progress import Progress
from pipeline.shards import ShardImages

SPLIT, BATCH = "train", 128
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Neighbour:
    """A training image; `distance` is Euclidean, between activations as fc8 reads them at test."""

    name: str
    wnid: str
    words: str
    distance: float


class Index:
    """RUN/similar/CHECKPOINT-DATA/: rows.f16 [images, F], and index.json, which says that they are whole."""

    def __init__(self, trained: Trained, data: str, images: int):
        self.features, self.images = trained.run.recipe.neurons[1], images
        self._all = trained.folder.path / "similar"
        self.folder = self._all / f"{trained.checkpoint.name}-{data[:12]}"
        self._described = {"checkpoint": trained.checkpoint.name, "data": data, "split": SPLIT,
                           "images": images, "features": self.features}

    def is_there(self) -> bool:
        """UserError where it is damaged."""
        try:
            described = json.loads((self.folder / "index.json").read_bytes())
        except FileNotFoundError:
            return False
        except (ValueError, RecursionError):
            described = None
        rows = self.folder / "rows.f16"
        if described != self._described or not rows.is_file() or rows.stat().st_size != 2 * self.images * self.features:
            raise UserError(f"{self.folder}: damaged; remove it, and it is built again")
        return True

    def build(self, trained: Trained, images: ShardImages, progress: Progress) -> None:
        """Both processes call it; rank 0 writes, and removes the indices of earlier checkpoints."""
        if trained.world.leads:
            for old in self._all.glob("step-*-*"):
                if not old.name.startswith(f"{trained.checkpoint.name}-"):
                    shutil.rmtree(old)
            self.folder.mkdir(parents=True, exist_ok=True)
        done = 0
        with creating(self.folder / "rows.f16") if trained.world.leads else nullcontext() as file:
            for pixels, labels in trained.batches(images, 1, BATCH):
                rows = trained.last_hidden(pixels).clamp(-LARGEST, LARGEST).half().cpu().numpy()
                if file is not None:
                    file.write(rows.tobytes())
                done += len(labels)
                progress(done, len(images), "looking at training images")
        if trained.world.leads:
            write_durably(self.folder / "index.json", (json.dumps(self._described, indent=1) + "\n").encode())

    def nearest(self, query: np.ndarray, count: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the `count` images nearest to float32 [F], the nearest first (of equals the first stored), and their
        distances."""
        rows = np.memmap(self.folder / "rows.f16", np.uint16, "r", shape=(self.images, self.features))
        squares = np.empty(self.images, np.float32)
        bounds = [self.images * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda *part: _squared_distances(rows, query, squares, *part), bounds, bounds[1:]))
        count = min(count, self.images)
        found = np.flatnonzero(squares <= np.partition(squares, count - 1)[count - 1])
        found = found[np.argsort(squares[found], kind="stable")][:count]
        return found, np.sqrt(squares[found])


@compiled(fastmath={"reassoc", "contract"})
def _squared_distances(rows, query, out, first, last):
    """Fill out[first:last] of float32 [N] from rows, the bits of half-precision numbers [N, F]."""
    # A half's exponent and fraction, put where a single's are, make a number 2^112 times too small, subnormal or not.
    scale = np.float32(2.0**112)
    for i in range(first, last):
        row, total = rows[i], np.float32(0)
        for j in range(len(query)):
            half = np.uint32(row[j])
            bits = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13) | (half & np.uint32(0x8000)) << np.uint32(16))
            difference = bits.view(np.float32) * scale - query[j]
            total += difference * difference
        out[i] = total


def open_index(
    trained: Trained, shards: Path, manifest: Manifest, data: str, progress: Progress
) -> tuple[Index, ShardImages]:
    """Return the index of a run's newest checkpoint over the training images of `shards`, built where there is none.

    `data` is the manifest's hash. While it is built, other commands on the run wait.
    """
    world, images = trained.world, ShardImages(shards, manifest, SPLIT)
    index = Index(trained, data, len(images))
    with locked(trained.folder.path / "similar.lock", wait=True) if world.leads else nullcontext():
        missing = torch.tensor([world.leads and not index.is_there()], dtype=torch.int64, device=world.device)
        if world.exchange is not None:
            missing = missing + world.exchange.swap(missing, "whether there is an index")
        if missing.any():
            if world.leads:
                check_files(shards, manifest.splits[SPLIT].files)
            index.build(trained, images, progress)
    return index, images


def similar(
    world: World, run_path: Path, shards: Path, pictures: Sequence[Path], count: int,
    broken: Callable[[Path, str], object], progress: Progress,
) -> Iterator[tuple[Path, list[Neighbour]]]:
    """Yield each picture with the `count` training images nearest to it; see `launch.predict.predict` for the rest."""
    world.await_leader()
    manifest, data = load_manifest(shards)
    trained = open_trained(world, run_path, {"pictures": list(map(str, pictures))}, (shards, manifest, data))
    index, images = open_index(trained, shards, manifest, data, progress)
    for files, pixels in seen(trained, pictures, 1, broken):
        for file, query in zip(files, trained.last_hidden(pixels).float().cpu().numpy()):
            rows, distances = index.nearest(query, count, world.threads)
            yield file, [Neighbour(images.name(row), manifest.classes[images.labels[row]].wnid,
                                   manifest.classes[images.labels[row]].words, float(distance))
                         for row, distance in zip(rows, distances)]
