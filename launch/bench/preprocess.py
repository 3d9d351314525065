"""Speed of packing, beside a bare loop and the usual script over the same images in the same run."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from launch.bench import preprocess_peers
from launch.bench.report import beside, result
from launch.environment import usable_cores
from launch.errors import UserError
from pipeline.packing.plan import Packing
from pipeline.packing.preprocess import preprocess
from pipeline.sources import open_source
from pipeline.storage import open_storage


def jpegs_in(images: Path) -> tuple[list[Path], list[Path]]:
    """Return the files below a folder, and those that are JPEGs which all contestants read; UserError for none."""
    files = sorted(path for path in images.rglob("*") if path.is_file())
    found = [path for path in files if preprocess_peers.decodes(path)]
    if not found:
        raise UserError(f"{images}: no JPEG files there")
    return files, found


def preprocess_speed(
    images: Path, total: int, repeats: int, workers: int | None, store: str = "jpeg", peers: bool = True
) -> dict:
    """Pack the JPEG files below `images`, repeated to `total`, `repeats` times; others are left out.

    Ours counts from the command to the manifest: listing, starting the workers, reading, hashing, statistics, writing.
    With `peers` every repeat also measures a bare loop (libjpeg-turbo decodes, the same resize and encoder; nothing is
    written) and the usual script (Pillow: decode, bicubic or Lanczos, centre, save); the start of their processes
    does not count; a ratio is our images per second divided by theirs in the same repeat. The usual script runs in one
    process, as such scripts do; `usual_bicubic_processes` is as many of them as we have workers.
    """
    files, found = jpegs_in(images)
    workers = workers or usable_cores()
    rates: dict[str, list[float]] = {"ours": []}
    with tempfile.TemporaryDirectory(prefix="alexnet-bench-") as work:
        source = _repeated(found, total, Path(work, "source"))
        repeated = sorted((source / "train" / "n00000000").iterdir())
        few = repeated[: max(1, total // 4)]  # for what is slow and starts at once
        for repeat in range(repeats):
            began = time.perf_counter()
            manifest = preprocess(open_source(source), open_storage(Path(work, f"shards{repeat}")), Packing(store),
                                  workers)
            packed = sum(split.images for split in manifest.splits.values())
            rates["ours"].append(packed / (time.perf_counter() - began))
            if peers:
                measured = {
                    "bare_loop": preprocess_peers.bare_loop(repeated, workers),
                    "usual_bicubic": preprocess_peers.usual_script(few, 1, "BICUBIC", Path(work, "b")),
                    "usual_lanczos": preprocess_peers.usual_script(few, 1, "LANCZOS", Path(work, "l")),
                    "usual_bicubic_processes": preprocess_peers.usual_script(few, workers, "BICUBIC",
                                                                             Path(work, "p")),
                }
                for name, rate in measured.items():
                    rates.setdefault(name, []).append(rate)
    ours = rates.pop("ours")
    return result(
        "preprocess", "images_per_s", ours, store=store, images=packed, workers=workers,
        left_out=len(files) - len(found),
        mean_bytes=round(statistics.mean(path.stat().st_size for path in found)),
        **beside(ours, rates),
    )


def _repeated(found: list[Path], total: int, source: Path) -> Path:
    """Make class folders of links: `total` training images and a validation image."""
    for split, count in (("train", total), ("val", 1)):
        folder = source / split / "n00000000"
        folder.mkdir(parents=True)
        for i in range(count):
            path = found[i % len(found)]
            (folder / f"{i:06d}{path.suffix}").symlink_to(path.resolve())
    return source
