"""Commands on data sets: sample, inspect, preprocess, verify."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from launch.commands.options import FOLDER, PLACE, Number, cache_option

MOST_WORKERS = 32  # unless more are asked for: the one process that writes keeps about so many busy


@click.command()
@click.argument("out", type=FOLDER)
@click.option("--train-per-class", default=100, show_default=True, type=click.IntRange(1),
              help="Training pictures of each class.")
@click.option("--val-per-class", default=20, show_default=True, type=click.IntRange(1),
              help="Validation pictures of each class.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0),
              help="Same seed, same archives, byte for byte.")
def sample(out: Path, train_per_class: int, val_per_class: int, seed: int) -> None:
    """Draw a sample data set into OUT.

    It comes in the three archives that ILSVRC-2012 comes in, and stands in for them.
    """
    from tqdm import tqdm

    from pipeline.sample import write_sample

    with tqdm(total=10 * (train_per_class + val_per_class), unit="image", disable=None) as bar:
        made = write_sample(out, train_per_class, val_per_class, seed, progress=bar.update)
    click.echo(f"{out}: {made['train']} training and {made['val']} validation images of {made['classes']} classes "
               "in ILSVRC-2012's archives")


@click.command()
@click.argument("source", type=FOLDER)
@click.option("--check-md5", is_flag=True, help="Compare the archives with the published MD5 sums.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def inspect(source: Path, check_md5: bool, as_json: bool) -> None:
    """Say what SOURCE is and holds, and what is missing.

    Reads labels and lists, not the images; writes nothing. SOURCE as for preprocess.
    """
    from launch.errors import UserError
    from launch.progress import TaskBars
    from pipeline.inspect import inspect
    from pipeline.manifest import FILE_NAME
    from pipeline.sources import open_source

    if (source / FILE_NAME).is_file():
        raise UserError(f"{source}: a run; see `alexnet report`" if (source / "run.json").is_file() else
                        f"{source}: packed already; `alexnet verify` checks it")
    found = open_source(source)
    with TaskBars() as bars:
        sums = _check_md5(found, bars) if check_md5 else {}
        splits = inspect(found, bars)
    if as_json:
        click.echo(json.dumps({"source": str(source), "layout": found.layout, "classes": len(found.classes),
                               "splits": {name: asdict(split) for name, split in splits.items()},
                               "missing": found.missing, "md5": sums}))
        return
    click.echo(f"{source}: {found.layout}, {len(found.classes)} classes")
    for name, split in splits.items():
        refused = f", {split.refused} entries that will not be read" if split.refused else ""
        each = f"{split.fewest} to {split.most}" if split.fewest < split.most else split.most
        click.echo(f"  {name}: {split.images} images of {split.classes} classes, {each} each{refused}")
    if "val" not in splits:
        click.echo("  val: none; preprocess holds out some of the training images")
    for line in found.missing:
        click.echo(f"  missing: {line}")
    for verdict in dict.fromkeys(sums.values()):
        names = [name for name, found in sums.items() if found == verdict]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        click.echo(f"  MD5 {verdict}: {', '.join(names[:5])}{more}")


@click.command()
@click.argument("source", type=FOLDER)
@click.argument("out", type=PLACE)
@click.option("--store", default="jpeg", show_default=True, type=click.Choice(["jpeg", "raw"]),
              help="JPEG (about 22 kB an image), or raw pixels (197 kB): no decoding, for hosts with memory to spare.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the order of the images.")
@click.option("--hold-out", default=0.02, show_default=True, type=Number(0, 0.9, min_open=True),
              help="Share of the training images to validate on, where SOURCE has no validation images.")
@click.option("--strict", is_flag=True, help="An image that cannot be read is an error.")
@click.option("--check-md5", is_flag=True, help="First compare the archives with the published MD5 sums.")
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes that decode; default: one a core.")
def preprocess(source: Path, out: str, store: str, seed: int, hold_out: float, strict: bool, check_md5: bool,
               workers: int | None) -> None:
    """Pack SOURCE into shards in OUT.

    Shorter side to 256, central 256 x 256, in a shuffled order; and the mean image and colour covariance of the
    training set. What cannot be read is left out and listed in OUT/rejected.jsonl. After a stop the same command goes
    on where it was. Under torchrun the processes share the work.

    SOURCE: the archives of ILSVRC-2012 or 2010, ImageNet's synset tars, Kaggle's CLS-LOC, Tiny-ImageNet, Hugging Face's
    Parquet files, WebDataset tars, or class folders train/WNID/* and val/WNID/*; `alexnet inspect` tells. OUT: a
    folder, or a place in an object store, like s3://bucket/folder.
    """
    from launch.environment import local_size, rank_and_size, usable_cores
    from launch.progress import TaskBars
    from pipeline.manifest import REJECTED_NAME
    from pipeline.packing.agreement import Share
    from pipeline.packing.plan import Packing
    from pipeline.packing.preprocess import preprocess
    from pipeline.sources import open_source
    from pipeline.storage import open_storage

    share = Share(*rank_and_size())
    storage = open_storage(out)
    found = open_source(source)
    with TaskBars(shown=share.rank == 0) as bars:
        if check_md5 and share.rank == 0 and "as published" not in _check_md5(found, bars).values():
            click.echo(f"alexnet: {source}: no MD5 was compared, for none is published of what lies there", err=True)
        workers = workers or max(1, min(usable_cores() // local_size(), MOST_WORKERS))
        manifest = preprocess(found, storage, Packing(store, seed, hold_out), workers, strict, share, bars)
    if manifest is None:
        return
    counts = ", ".join(f"{split.images} {name}" for name, split in manifest.splits.items())
    held_out = f" ({manifest.held_out:.0%} held out of the training images as val)" if manifest.held_out else ""
    left_out = f"; {manifest.rejected} left out, see {REJECTED_NAME} there" if manifest.rejected else ""
    click.echo(f"{storage.location}: {counts} images of {len(manifest.classes)} classes{held_out}{left_out}")


def _check_md5(source, progress) -> dict[str, str]:
    from pipeline.sources.md5 import check_md5

    return check_md5(source, progress)


@click.command()
@click.argument("shards", type=PLACE)
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes that decode; default: one a core.")
@cache_option
def verify(shards: str, workers: int | None, cache: Path | None) -> None:
    """Prove SHARDS whole: hash, count and decode everything again.

    Of shards in an object store, the local copy; of the store itself, that every file has its size.
    """
    from launch.environment import usable_cores
    from launch.progress import TaskBars, shards_here
    from pipeline.errors import DataError
    from pipeline.manifest import load_manifest
    from pipeline.storage import LocalStorage, open_storage
    from pipeline.verify import verify, verify_place

    folder, storage = shards_here(shards, cache), open_storage(shards)
    manifest, data = load_manifest(folder)
    with TaskBars() as bars:
        try:
            verify(folder, manifest, workers or usable_cores(), bars)
        except DataError as error:
            if isinstance(storage, LocalStorage):
                raise
            raise DataError(f"{error} ({folder} is a copy of {storage.location}; once removed, it is fetched anew)"
                            ) from None
    verify_place(storage, manifest)
    counts = ", ".join(f"{split.images} {name}" for name, split in manifest.splits.items())
    click.echo(f"{storage.location}: whole: {counts} images of {len(manifest.classes)} classes, manifest {data[:12]}")
