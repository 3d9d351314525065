"""Commands that measure speed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.commands.options import FOLDER, PRECISIONS, TRANSPORTS, Number, graphs_option, process_options
from launch.errors import RunFailed

if TYPE_CHECKING:
    from launch.world import World

RECIPE = click.option("--recipe", default="notes", show_default=True)
CLASSES = click.option("--classes", default=1000, show_default=True, type=click.IntRange(2, 1 << 20))
REPEATS = click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="After one other.")
PEERS = click.option("--peers/--no-peers", default=True, help="Measure in turn with what others use.")


@click.group()
def bench() -> None:
    """Measure speed; prints JSON."""


@bench.command("preprocess")
@click.argument("images", type=FOLDER)
@click.option("--total", default=8000, show_default=True, type=click.IntRange(1), help="Images to pack, repeated.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes; default: one a core.")
@click.option("--store", default="jpeg", show_default=True, type=click.Choice(["jpeg", "raw"]))
@PEERS
def bench_preprocess(images: Path, **settings) -> None:
    """Pack the image files below the folder IMAGES."""
    from launch.bench.preprocess import preprocess_speed

    click.echo(json.dumps(preprocess_speed(images, **settings)))


@bench.command("loader")
@click.argument("shards", type=FOLDER)
@click.option("--batch", default=128, show_default=True, type=click.IntRange(1, 4096))
@click.option("--batches", default=20, show_default=True, type=click.IntRange(1), help="A repeat.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="Of DALI; default: one a core.")
@PEERS
def bench_loader(shards: Path, **settings) -> None:
    """Deliver training batches from SHARDS, and do nothing with them."""
    from launch.bench.loader import loader_speed

    click.echo(json.dumps(loader_speed(shards, **settings)))


@bench.command("step")
@RECIPE
@click.option("--ablation", help="One change to the recipe: as of `alexnet ablate`: no-lrn ...; then without peers.")
@CLASSES
@click.option("--batch", type=click.IntRange(2, 4096), help="Images a step; default: the recipe's.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1),
              help="Measured, after two others; on a GPU twenty times as many.")
@PEERS
@graphs_option
@process_options
def bench_step(recipe: str, ablation: str | None, classes: int, batch: int | None, steps: int, peers: bool,
               **process) -> None:
    """Training steps on made-up images; alone, or under torchrun with two processes."""
    from launch.bench.step import step_speed
    from model.ablations import ablated
    from model.recipe import recipe_named

    chosen = recipe_named(recipe)
    if ablation is not None:
        chosen = ablated(chosen, ablation)
    if batch is not None:
        chosen = replace(chosen, batch=batch)
    peers = peers and ablation is None
    _in_world(process, lambda world: step_speed(world, chosen, classes, steps, peers) | {"ablation": ablation})


@bench.command("evaluate")
@RECIPE
@CLASSES
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1, 4096),
              help="Images of ten views at a time.")
@REPEATS
@PEERS
@process_options
def bench_evaluate(recipe: str, classes: int, batch: int, repeats: int, peers: bool, **process) -> None:
    """Evaluation with ten views of made-up images; alone, or under torchrun with two processes."""
    from launch.bench.evaluate import evaluate_speed
    from model.recipe import recipe_named

    chosen = recipe_named(recipe)
    _in_world(process, lambda world: evaluate_speed(world, chosen, classes, batch, repeats, peers))


@bench.command("lrn")
@RECIPE
@REPEATS
@PEERS
@process_options
def bench_lrn(recipe: str, repeats: int, peers: bool, **process) -> None:
    """Response normalisation, both passes, in one process."""
    from launch.bench.lrn import lrn_speed
    from model.recipe import recipe_named

    chosen = recipe_named(recipe)
    _in_world(process, lambda world: lrn_speed(world, chosen, repeats, peers))


@bench.command("exchange")
@RECIPE
@REPEATS
@process_options
def bench_exchange(recipe: str, repeats: int, **process) -> None:
    """The towers' messages alone; under torchrun with two processes."""
    from launch.bench.exchange import exchange_speed
    from model.recipe import recipe_named

    chosen = recipe_named(recipe)
    _in_world(process, lambda world: exchange_speed(world, chosen, repeats))


@bench.command("pair")
@RECIPE
@CLASSES
@REPEATS
@click.option("--link-gb-s", default=50.0, show_default=True, type=Number(1e-3, 1e6),
              help="GB/s each way between the devices; 50: PCIe 5.0 x16; NVLink of an H100 has 450.")
@click.option("--latency-us", default=20.0, show_default=True, type=Number(0, 1e6), help="Microseconds a swap.")
@graphs_option
@process_options
def bench_pair(recipe: str, classes: int, repeats: int, link_gb_s: float, latency_us: float, **process) -> None:
    """Two towers on two devices, modelled from one tower's measured speed; in one process."""
    from launch.bench.pair import pair_model
    from model.recipe import recipe_named

    chosen = recipe_named(recipe)
    _in_world(process, lambda world: pair_model(world, chosen, classes, repeats, link_gb_s * 1e9, latency_us / 1e6))


@bench.command("scaling")
@click.option("--data", default="raw", show_default=True, type=click.Choice(["made-up", "raw", "jpeg"]))
@click.option("--step-ms", "whole_s", type=Number(1e-3, 1e6), help="Of the whole network; default: measured.")
@click.option("--tower-ms", "tower_s", type=Number(1e-3, 1e6), help="Of one tower, waiting apart; default: measured.")
@click.option("--link-gb-s", "link_bytes_per_s", type=Number(1e-3, 1e6), help="Between GPUs of a host, each way.")
@click.option("--network-gbit-s", "network_bytes_per_s", type=Number(1e-3, 1e6), help="Between hosts, of a GPU.")
@click.option("--network-latency-us", "network_latency_s", type=Number(0, 1e6), help="A step of a ring between hosts.")
@click.option("--gradient-bytes", type=click.Choice(["2", "4"]), help="Of a number sent; default: 4.")
@click.option("--json", "as_json", is_flag=True, help="Numbers in place of tables.")
@click.option("--figure", type=click.Path(path_type=Path), help="Also draw efficiency, to FIGURE.png and FIGURE.svg.")
def bench_scaling(data: str, as_json: bool, figure: Path | None, **given) -> None:
    """Speed on 1 to 512 GPUs, computed from measured parts and assumed links; measures nothing.

    Every number is from slow to fast: what has not been measured is assumed twice. What is given here counts in both.
    """
    from launch.bench.scaling import FAST, SLOW, checks, rows
    from launch.bench.scaling_page import draw_efficiency, markdown
    from launch.figures.drawing import save

    scales = {"whole_s": 1e-3, "tower_s": 1e-3, "link_bytes_per_s": 1e9, "network_bytes_per_s": 1e9 / 8,
              "network_latency_s": 1e-6, "gradient_bytes": 1}
    changed = {name: float(value) * scales[name] for name, value in given.items() if value is not None}
    machines = tuple(replace(machine, **changed) for machine in (SLOW, FAST))
    if figure is not None:
        save(draw_efficiency(machines, data), figure)
    if as_json:
        click.echo(json.dumps({"machines": dict(zip(("slow", "fast"), map(asdict, machines))), "data": data,
                               "fixed_batch": rows(machines, data, 128), "fixed_batch_a_network":
                               rows(machines, data, None), "checks": checks()}))
    else:
        click.echo(markdown(machines, data), nl=False)


@bench.command("all")
@click.argument("out", type=FOLDER)
@click.option("--shards", type=FOLDER, help="For the loader.")
@click.option("--images", type=FOLDER, help="A folder of JPEG files, for packing.")
@RECIPE
@click.option("--device", help="cpu, cuda or cuda:N; default: cuda where there is one.")
@click.option("--precision", type=click.Choice(PRECISIONS))
@click.option("--transport", default="rpc", show_default=True, type=click.Choice(TRANSPORTS),
              help="Of the parts that take two processes.")
def bench_all(out: Path, shards: Path | None, images: Path | None, recipe: str, device: str | None,
              precision: str | None, transport: str) -> None:
    """Measure everything into the folder OUT: JSON a part, and results.md.

    Parts that OUT has of this commit are not measured again.
    """
    from launch.bench.everything import measure_everything

    failed = measure_everything(out, shards, images, recipe, device, precision, transport,
                                lambda line: click.echo(line, err=True))
    click.echo(str(out / "results.md"))
    if failed:
        raise RunFailed(f"{len(failed)} of the benchmarks failed; {failed[0]}")


def _in_world(process: dict, measure: Callable[[World], dict]) -> None:
    import torch

    from launch.world import join_world

    with join_world(**process) as world:
        try:
            found = measure(world)
        except RuntimeError as error:  # torch has an error of its own for this on GPUs alone
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise RunFailed(f"{world.device}: out of memory; a smaller recipe, batch or number of classes takes "
                            "less") from None
    if world.leads:
        click.echo(json.dumps(found))
