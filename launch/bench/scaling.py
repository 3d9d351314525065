"""Steps per second on many GPUs, on paper: parts that were measured, put together by the formulas below.

Every measured constant names its place in docs/results.md. What nobody has measured here is assumed twice, once badly
(SLOW) and once well (FAST); docs/scaling.md says why so.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from launch.bench.exchange import activations
from launch.bench.floors import step_work
from launch.errors import UserError
from model.network import AlexNet
from model.recipe import NOTES

GPUS = (1, 2, 8, 64, 512)
IMAGES, EPOCHS = 1_281_167, 90  # of ILSVRC-2012's training set; the recipe's
LAYOUTS = {1: "whole", 2: "pairs"}  # by GPUs a network
# Measured for docs/scaling.md on the machine of docs/results.md.
LOOPBACK = 1.2e9  # bytes/s from process to process: `bench exchange --transport gloo`
SMALL_BATCHES = {8: 66.4, 2: 29.2}  # images/s by images: `bench step --batch`
FC = ("fc8", "fc7", "fc6")  # in the order of their gradients


@dataclass(frozen=True)
class Data:
    """One row of "On a GPU": images/s of training from it and of its loader alone; bytes of a stored image."""

    training: float
    loader: float
    image_bytes: float


DATA = {  # the loader of raw pixels with eight threads: "The loader"; 29 GB of JPEGs: README.md, of 1,331,167 images
    "made-up": Data(43_580, math.inf, 0),
    "raw": Data(33_450, 66_100, 256 * 256 * 3),
    "jpeg": Data(24_990, 40_800, 29e9 / 1_331_167),
}


@dataclass(frozen=True)
class Sizes:
    """What the shapes of `notes` with 1,000 classes say."""

    parameters: dict[str, int]  # by layer
    message_bytes: tuple[int, ...]  # an image: what a tower sends forward
    weight_bytes: float  # that a step of the whole network moves whatever its batch: weights, gradients, velocities
    behind: float  # share of a step's operations: the backward pass through the convolutions


@dataclass(frozen=True)
class Machine:
    """What steps are made of. Rates are of one GPU, each way."""

    whole_s: float  # a step of the whole network, of `recipe.batch` images
    tower_s: float  # of one tower, what it waits for apart
    copied_bytes_per_s: float  # by its own memory, read and written
    number_bytes: int  # of an activation
    gradient_bytes: int  # of a number of a gradient
    small_kernels_s: float  # of a step, whatever its width and batch
    between_graphs_s: float  # of a pair's step, waiting that is no message's
    hidden: float  # share of the backward pass through the convolutions beside which gradients travel
    link_bytes_per_s: float  # within a host, as the two below
    link_latency_s: float  # a step of a ring
    message_latency_s: float  # a message between towers
    network_bytes_per_s: float  # between hosts, as the one below
    network_latency_s: float
    host_gpus: int = 8


@functools.cache
def sizes(number_bytes: int) -> Sizes:
    """Count what `Sizes` says, with numbers of so many bytes: on the model's own shapes, without memory."""
    operations: dict[str, int] = {}

    def count(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        operations[names[layer]] = output.numel() * layer.weight[0].numel()

    with torch.device("meta"), torch.no_grad():
        network = AlexNet(replace(NOTES, lrn_n=0, dropout=0.0), 1000)
        names = {layer: name for name, layer in network.named_children() if isinstance(layer, (nn.Conv2d, nn.Linear))}
        for layer in names:
            layer.register_forward_hook(count)
        network(torch.empty(1, 3, 224, 224))
    backward = sum(n * (1 if name == "conv1" else 2) for name, n in operations.items() if name not in FC)
    images = replace(NOTES, batch=1)
    one, two = (step_work(replace(NOTES, batch=batch), 1000, number_bytes)[1] for batch in (1, 2))
    return Sizes({name: sum(p.numel() for p in layer.parameters()) for layer, name in names.items()},
                 (*(math.prod(shape) * number_bytes for shape in activations(images).values()), 3 * 4),  # model.softmax
                 2 * one - two, 2 * backward / step_work(images, 1000, number_bytes)[0])


def compute_parts(machine: Machine, towers: int, images: int) -> dict[str, float]:
    """Return the seconds of a step that no other process has a part in: t(n) = t0 + n t1, for n `images`.

    t0: moving the weights, their gradients and velocities at the rate of a copy (launch.bench.floors.step_work at 0
    images; the update is in it), and the kernels that are too small for more. t1 is the rest of the measured step.
    """
    weights = sizes(machine.number_bytes).weight_bytes / towers / machine.copied_bytes_per_s
    fixed = weights + machine.small_kernels_s
    full = machine.whole_s if towers == 1 else machine.tower_s
    if full <= fixed:
        raise UserError(f"a step of {1e3 * full:g} ms: its weights and small kernels alone take {1e3 * fixed:.2g} ms; "
                        f"give --{'step' if towers == 1 else 'tower'}-ms more")
    return {"fixed": fixed, "images": (full - fixed) * images / NOTES.batch}


def exchange_s(machine: Machine, images: int) -> float:
    """Return what a pair's messages add: on the way forward nothing hides them (docs/results.md, "Two towers on two
    GPUs"), on the way back the gradients of weights are computed meanwhile (model.joined)."""
    return machine.between_graphs_s + sum(machine.message_latency_s + images * size / machine.link_bytes_per_s
                                          for size in sizes(machine.number_bytes).message_bytes)


def all_reduce_s(machine: Machine, towers: int, replicas: int, size: float) -> float:
    """Return the seconds of summing `size` bytes over replicas, of which a host has as many as it has GPUs for.

    Ring of p: 2 (p - 1) / p size / rate + 2 (p - 1) latency (Thakur et al. 2005; Patarasuk and Yuan 2009). Between h
    hosts each GPU has its share of the bytes, in a ring or in two trees (Sanders et al. 2009), whichever is sooner: 2
    size / (0.92 rate) + 2 log2(h) latency, as NCCL reckons (its src/graph/tuning.cc). Pieces follow each other, so that
    the slower link counts.
    """
    local = min(replicas, machine.host_gpus // towers)
    hosts, share = replicas / local, size / local
    within = 2 * (local - 1) * share / machine.link_bytes_per_s
    ring = (max(within, 2 * (hosts - 1) / hosts * share / machine.network_bytes_per_s)
            + 2 * (hosts - 1) * machine.network_latency_s)
    trees = (max(within, 2 * share / (0.92 * machine.network_bytes_per_s))
             + 2 * math.log2(hosts) * machine.network_latency_s)
    return 2 * (local - 1) * machine.link_latency_s + min(ring, trees)


def gradients_s(machine: Machine, towers: int, replicas: int, images: int) -> float:
    """Return what averaging gradients over replicas adds to a step.

    Those of the fully connected layers, nearly all bytes, come first in the backward pass; the rest of it, through the
    convolutions, is nearly all work (Krizhevsky 2014): so much of it as is `hidden` hides them. Those of the
    convolutions come at its end.
    """
    if replicas == 1:
        return 0.0
    of = sizes(machine.number_bytes)
    scale = machine.gradient_bytes / towers
    first = sum(all_reduce_s(machine, towers, replicas, of.parameters[name] * scale) for name in FC)
    last = sum(n for name, n in of.parameters.items() if name not in FC) * scale
    behind = machine.hidden * of.behind * compute_parts(machine, towers, images)["images"]
    return max(0.0, first - behind) + all_reduce_s(machine, towers, replicas, last)


def step_parts(machine: Machine, data: str, towers: int, gpus: int, images: int) -> dict[str, float]:
    """Return the seconds of a step by part, of `images` in each of gpus / towers networks.

    What the loader adds: by sharing the GPU, an image what it adds to training one process; or more where it alone
    takes longer than the step. Each tower of a pair has the pixels of all of the pair's images.
    """
    parts = compute_parts(machine, towers, images)
    if towers == 2:
        parts["exchange"] = exchange_s(machine, images)
    parts["gradients"] = gradients_s(machine, towers, gpus // towers, images)
    parts["data"] = max(images * (1 / DATA[data].training - 1 / DATA["made-up"].training),
                        images / DATA[data].loader - sum(parts.values()))
    return parts


def _machine(**assumed) -> Machine:
    """An H200, docs/results.md, "On a GPU": 43,580 images/s; 0.19 of a step is its bytes at the rate of a copy; a tower
    keeps it busy for 1.81 ms; a pair was modelled at 450 GB/s and 20 microseconds a message."""
    whole_s = NOTES.batch / DATA["made-up"].training
    moved = step_work(NOTES, 1000, number_bytes=2)[1]
    ideal = Machine(
        whole_s=whole_s, tower_s=1.81e-3, copied_bytes_per_s=moved / (0.19 * whole_s), number_bytes=2, gradient_bytes=4,
        small_kernels_s=0.0, between_graphs_s=0.0, hidden=1.0, link_bytes_per_s=450e9, link_latency_s=3.4e-6,
        message_latency_s=20e-6, network_bytes_per_s=50e9, network_latency_s=14e-6)
    waits = whole_s / assumed.pop("speed_up") - ideal.tower_s - exchange_s(ideal, NOTES.batch)
    return replace(ideal, between_graphs_s=waits, **assumed)


# "Two towers on two GPUs": a profile gave the whole network 3.00 ms, half of it 1.81, so that 2 x 1.81 - 3.00 is of
# kernels that did not get shorter; a pair was 1.31 to 1.42 times as fast as one GPU. Links: docs/scaling.md.
SLOW = _machine(speed_up=1.31, small_kernels_s=2 * 1.81e-3 - 3.00e-3, hidden=0.0, link_bytes_per_s=185e9,
                network_bytes_per_s=50e9 / 8, link_latency_s=1.9 * 3.4e-6, network_latency_s=1.9 * 14e-6)
FAST = _machine(speed_up=1.42, link_bytes_per_s=370e9)


def rows(machines: tuple[Machine, Machine], data: str, batch: int | None) -> list[dict]:
    """Return a row for each number of GPUs and layout: of a global `batch`, or (None) of 128 images a network.

    Each of steps_per_s, images_per_s, efficiency (images/s a GPU, divided by those of one GPU) and hours (90 epochs) is
    (slow, fast), as are parts, the seconds of a step. None of them is there where networks outnumber images.
    """
    made = []
    alone = [sum(step_parts(machine, data, 1, 1, NOTES.batch).values()) / NOTES.batch for machine in machines]
    for gpus in GPUS:
        for towers in (towers for towers in LAYOUTS if towers <= gpus):
            networks = gpus // towers
            row = {"gpus": gpus, "layout": LAYOUTS[towers], "batch": batch or networks * NOTES.batch}
            row["images_a_network"] = row["batch"] / networks
            if row["images_a_network"] >= 1:
                images = row["batch"] // networks
                found = [step_parts(machine, data, towers, gpus, images) for machine in machines]
                seconds = [sum(parts.values()) for parts in found]
                row |= {"steps_per_s": [1 / s for s in seconds], "images_per_s": [row["batch"] / s for s in seconds],
                        "efficiency": [row["batch"] / s * one / gpus for s, one in zip(seconds, alone)],
                        "hours": [EPOCHS * IMAGES / row["batch"] * s / 3600 for s in seconds],
                        "parts": found}
            made.append(row)
    return made


def checks() -> list[dict]:
    """Return what the same functions say of two CPU cores, in images/s unless said otherwise, beside what was measured
    (docs/results.md, "Full width"; the last two: docs/scaling.md)."""
    whole_s = NOTES.batch / 101.3  # two threads
    moved = step_work(NOTES, 1000, number_bytes=4)[1]
    cpu = replace(SLOW, whole_s=whole_s, tower_s=whole_s / 2, copied_bytes_per_s=moved / (0.055 * whole_s),
                  number_bytes=4, small_kernels_s=0.0, between_graphs_s=0.0, link_bytes_per_s=50e9)
    one = replace(cpu, tower_s=whole_s, copied_bytes_per_s=cpu.copied_bytes_per_s / 2, link_bytes_per_s=LOOPBACK)
    stock = replace(one, whole_s=2 * NOTES.batch / (101.3 / 1.99))  # in one thread

    def pair_s(machine: Machine) -> float:
        return sum(compute_parts(machine, 2, NOTES.batch).values()) + exchange_s(machine, NOTES.batch)

    replicas_s = sum(compute_parts(stock, 1, NOTES.batch // 2).values()) + gradients_s(stock, 1, 2, NOTES.batch // 2)
    return [{"what": what, "predicted": predicted, "measured": measured} for what, predicted, measured in (
        ("two towers on two machines, times one (`bench pair`)", whole_s / pair_s(cpu), 1.98),
        ("two towers, one thread each, RPC", NOTES.batch / pair_s(one), 99.2),
        ("two replicas, DistributedDataParallel", NOTES.batch / replicas_s, 99.2 / 2.3),
        *((f"one process, batch {images}", images / sum(compute_parts(cpu, 1, images).values()), measured)
          for images, measured in SMALL_BATCHES.items()))]
