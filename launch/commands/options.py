"""Kinds of arguments that several commands take."""

from __future__ import annotations

import math
from pathlib import Path

import click


class Place(click.ParamType):
    """A path, or an address in an object store. An empty one, of an unset variable, would mean this folder."""

    name = "place"

    def convert(self, value, param, ctx) -> str:
        if not value:
            self.fail("an empty name.", param, ctx)
        return value


class Folder(Place):
    name = "path"

    def convert(self, value, param, ctx) -> Path:
        if isinstance(value, Path):
            return value
        if "://" in value:
            self.fail(f"{value} is no path of this machine, which is wanted here.", param, ctx)
        return Path(super().convert(value, param, ctx))


PLACE, FOLDER = Place(), Folder()
TRANSPORTS = ["rpc", "rpc-staged", "cuda-ipc", "gloo", "nccl"]
PRECISIONS = ["fp32", "tf32", "bf16", "fp16"]


class Number(click.FloatRange):
    """A number in a range; click's own takes NaN, which is in none."""

    def convert(self, value, param, ctx) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


def process_options(command):
    """Options of every command that runs the network, in one process or under torchrun."""
    for option in reversed((
        click.option("--device", default=None, help="cpu, cuda or cuda:N; default: cuda where there is one."),
        click.option("--transport", default="rpc", show_default=True,
                     type=click.Choice(TRANSPORTS),
                     help="How two towers exchange; rpc-staged: RPC through the CPU's memory; cuda-ipc: through GPU "
                          "memory that both processes of one host map."),
        click.option("--precision", type=click.Choice(PRECISIONS),
                     help="Of convolutions and products; default: fp32 on a CPU, tf32 on a GPU."),
        click.option("--timeout", "timeout_s", default=300.0, show_default=True, type=Number(1, 86400),
                     help="Seconds after which a peer that is there, but sends nothing, ends the run."),
        click.option("--threads", type=click.IntRange(1, 1024),
                     help="CPU threads for arithmetic, and as many for DALI; default: a fair share of the cores."),
    )):
        command = option(command)
    return command


def graphs_option(command):
    """How training steps are sent to a GPU; beside `process_options`."""
    return click.option("--graphs/--no-graphs", default=None, help="Replay both passes of a step from CUDA "
                        "graphs; default: on a GPU, for one process, and for two with --transport cuda-ipc.")(command)


def whole_option(command):
    """How several processes share the work; beside `process_options`."""
    return click.option("--whole", is_flag=True, help="Have each process hold the whole network, replicas of which "
                        "share every batch, and not two of them a tower each.")(command)


def best_option(command):
    """Which checkpoint of a run."""
    return click.option("--best", is_flag=True, help="Take the checkpoint with the lowest validation error, not the "
                        "newest.")(command)


def cache_option(command):
    """Where shards of an object store are copied to."""
    return click.option("--cache", type=FOLDER, help="Folder for copies of shards that lie in an object store; "
                        "default: ~/.cache/alexnet.")(command)
