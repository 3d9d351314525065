"""The `alexnet` command. Thin: each command checks its words and calls the module that does the work.

Results go to stdout, everything for people to stderr. A user's mistake is one line and exit code 2, a run
that fails one line and exit code 1.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from pathlib import Path

import click

from launch import __version__

# Before torch is imported: its C++ side would warn of a peer's death in lines of its own beside ours.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

FOLDER = click.Path(path_type=Path)


class _Number(click.FloatRange):
    """A number in a range; click's own takes NaN, which is in none."""

    def convert(self, value, param, ctx) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class _Failure(click.ClickException):
    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file=None) -> None:
        click.echo("alexnet: " + " ".join(self.message.splitlines()), err=True)


class _Commands(click.Group):
    """Turns the errors that the packages raise for users into one line and an exit code."""

    def invoke(self, context: click.Context):
        from launch.errors import RunFailed, UserError
        from model.errors import PeerError, RecipeError
        from pipeline.errors import DataError, PreprocessError

        try:
            return super().invoke(context)
        except (UserError, DataError, RecipeError) as error:
            raise _Failure(str(error), 2) from None
        except (PeerError, PreprocessError, RunFailed) as error:
            raise _Failure(str(error), 1) from None
        except OSError as error:
            if error.filename is None:
                raise _Failure(f"cannot read or write: {error.strerror or error}", 1) from None
            raise _Failure(f"{error.filename}: {error.strerror}", 2) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """AlexNet (Krizhevsky, Sutskever and Hinton 2012) on two towers: from ImageNet's archives to its error."""


@cli.command()
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


@cli.command()
@click.argument("source", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes that decode; default: one a core.")
def preprocess(source: Path, out: Path, workers: int | None) -> None:
    """Pack SOURCE into shards in OUT.

    Shorter side to 256, central 256 x 256, and the mean image and colour covariance of the training set.

    SOURCE is a folder with ILSVRC-2012's archives, a folder (or a tar) of train/WNID/* and val/WNID/*.
    What cannot be read is left out and listed in OUT/rejected.jsonl.
    """
    from launch.progress import SplitBars
    from pipeline.preprocess import REJECTED_NAME, preprocess

    with SplitBars() as bars:
        manifest = preprocess(source, out, workers, bars)
    counts = ", ".join(f"{split.images} {name}" for name, split in manifest.splits.items())
    left_out = f"; {manifest.rejected} left out, see {out / REJECTED_NAME}" if manifest.rejected else ""
    click.echo(f"{out}: {counts} images of {len(manifest.classes)} classes{left_out}")


@cli.command()
@click.argument("shards", type=FOLDER)
def verify(shards: Path) -> None:
    """Prove SHARDS whole: hash and count again."""
    from launch.progress import check_with_bar
    from pipeline.manifest import load_manifest
    from pipeline.shards import ShardImages

    manifest, data = load_manifest(shards)
    check_with_bar(shards, manifest)
    counts = ", ".join(f"{len(ShardImages(shards, manifest, split))} {split}" for split in manifest.splits)
    click.echo(f"{shards}: whole: {counts} images of {len(manifest.classes)} classes, manifest {data[:12]}")


def _process_options(command):
    """Options of every command that runs the network, in one process or under torchrun."""
    for option in reversed((
        click.option("--device", default=None, help="cpu, cuda or cuda:N; default: cuda where there is one."),
        click.option("--transport", default="rpc", show_default=True,
                     type=click.Choice(["rpc", "rpc-staged", "gloo", "nccl"]),
                     help="How two towers exchange; rpc-staged: RPC through the CPU's memory."),
        click.option("--timeout", "timeout_s", default=300.0, show_default=True, type=_Number(1, 86400),
                     help="Seconds after which a silent peer ends the run."),
        click.option("--threads", type=click.IntRange(1, 1024),
                     help="CPU threads for arithmetic, and as many for DALI; default: a fair share of the cores."),
    )):
        command = option(command)
    return command


@cli.command()
@click.argument("shards", type=FOLDER)
@click.argument("run", type=FOLDER)
@click.option("--recipe", help="notes (default) or tiny.")
@click.option("--seed", type=click.IntRange(0), help="Of weights, batches and dropout; default 0.")
@click.option("--epochs", type=click.IntRange(1), help="Instead of the recipe's.")
@click.option("--steps", type=click.IntRange(1), help="Stop after so many steps in all, with a checkpoint.")
@click.option("--resume", is_flag=True, help="Go on from RUN's newest checkpoint.")
@click.option("--checkpoint-minutes", default=15.0, show_default=True, type=_Number(0, 1e6),
              help="Besides one after every epoch.")
@click.option("--keep", default=3, show_default=True, type=click.IntRange(1), help="Checkpoints kept, the newest.")
@click.option("--check/--no-check", default=True, help="Hash all shards before the start.")
@_process_options
def train(shards: Path, run: Path, recipe: str | None, seed: int | None, epochs: int | None, steps: int | None,
          resume: bool, checkpoint_minutes: float, keep: int, check: bool, **process) -> None:
    """Train on SHARDS; log and checkpoints go to RUN.

    Alone, one process trains the whole network. Under `torchrun --nproc-per-node=2` each process trains one
    tower: see launch/train.sh.
    """
    from launch.run_folder import RunFolder
    from launch.train import Options, train
    from launch.world import join_world
    from model.recipe import recipe_named

    if recipe is None and not resume:
        recipe = "notes"
    chosen = None if recipe is None else recipe_named(recipe)
    options = Options(resume, steps, checkpoint_minutes, keep, check)
    with join_world(**process) as world:
        folder = RunFolder(run)
        errors = train(world, shards, folder, chosen, seed if resume else seed or 0, epochs, options)
    if world.leads:
        last = f"validation top-1 error {errors.top1:.2%}, top-5 {errors.top5:.2%}; " if errors else ""
        click.echo(f"{run}: {last}log {folder.log_path}, checkpoints {folder.checkpoints}", err=True)


@cli.command()
@click.argument("run", type=FOLDER)
@click.argument("shards", type=FOLDER)
@click.option("--views", default="10", show_default=True, type=click.Choice(["1", "10"]),
              help="Centre crop alone, or four corners and centre with their mirror images.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1, 4096), help="Images at a time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_process_options
def evaluate(run: Path, shards: Path, views: str, batch: int, as_json: bool, **process) -> None:
    """Print top-1 and top-5 error of RUN.

    Of its newest checkpoint, over the validation images of SHARDS; alone or under torchrun, like train.
    """
    from launch.evaluate import evaluate_run
    from launch.world import join_world

    with join_world(**process) as world:
        found, step = evaluate_run(world, run, shards, int(views), batch)
    if not world.leads:
        return
    if as_json:
        click.echo(json.dumps({"run": str(run), "step": step, "views": int(views), "images": found.images,
                               "top1_error": found.top1, "top5_error": found.top5}))
    else:
        click.echo(f"top-1 error {found.top1:.2%}, top-5 error {found.top5:.2%} "
                   f"({found.images} images, {views} view{'s' if views != '1' else ''}, step {step})")


@cli.group()
def bench() -> None:
    """Measure speed; prints JSON."""


@bench.command("preprocess")
@click.argument("images", type=FOLDER)
@click.option("--total", default=2000, show_default=True, type=click.IntRange(1), help="Images to pack, repeated.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes; default: one a core.")
def bench_preprocess(images: Path, total: int, repeats: int, workers: int | None) -> None:
    """Pack the image files below the folder IMAGES."""
    from launch.bench import preprocess_speed

    click.echo(json.dumps(preprocess_speed(images, total, repeats, workers)))


@bench.command("loader")
@click.argument("shards", type=FOLDER)
@click.option("--batch", default=128, show_default=True, type=click.IntRange(1))
@click.option("--batches", default=20, show_default=True, type=click.IntRange(1), help="A repeat.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="Of DALI; default: one a core.")
def bench_loader(shards: Path, **settings) -> None:
    """Deliver training batches from SHARDS, and do nothing with them."""
    from launch.bench import loader_speed

    click.echo(json.dumps(loader_speed(shards, **settings)))


@bench.command("step")
@click.option("--recipe", default="notes", show_default=True)
@click.option("--classes", default=1000, show_default=True, type=click.IntRange(2))
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1), help="Measured, after two others.")
@_process_options
def bench_step(recipe: str, classes: int, steps: int, **process) -> None:
    """Training steps on made-up images; alone, or under torchrun with two processes."""
    from launch.bench import step_speed
    from launch.world import join_world
    from model.recipe import recipe_named

    chosen = recipe_named(recipe)
    with join_world(**process) as world:
        found = step_speed(world, chosen, classes, steps)
    if world.leads:
        click.echo(json.dumps(found))


def main() -> None:
    try:
        code = cli.main(prog_name="alexnet", standalone_mode=False) or 0
    except click.ClickException as error:
        if "TORCHELASTIC_RUN_ID" in os.environ and (os.environ["RANK"] != "0" or "other tower" in error.message):
            # Most likely rank 0 fails of the same, or the other tower failed first and has told why:
            # torchrun ends this process while it waits, and what went wrong is told once.
            time.sleep(5)
        if isinstance(error, click.UsageError):
            where = error.ctx.command_path if error.ctx else "alexnet"
            error = _Failure(f"{error.format_message()} See `{where} --help`.", error.exit_code)
        error.show()
        code = error.exit_code
    except click.Abort:
        click.echo("alexnet: stopped", err=True)
        code = 130
    except Exception:  # a bug of ours
        traceback.print_exc()
        code = 1
    distributed = sys.modules.get("torch.distributed")
    if code and distributed and distributed.is_initialized():
        # The peer may be dead or hang: RPC's and gloo's threads, which wait for it, are not to be joined.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
