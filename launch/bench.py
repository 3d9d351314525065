"""Speed of the parts, measured: warm-up apart, several repeats, median and spread."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from launch import facts
from launch.errors import UserError
from launch.world import World, device_named
from model.optimizer import MomentumSGD
from model.recipe import Recipe
from model.softmax import cross_entropy
from model.tower import build
from pipeline.batches import Lighting, TrainingBatches
from pipeline.loader import TrainingLoader
from pipeline.manifest import load_manifest
from pipeline.preprocess import preprocess
from pipeline.shards import ShardImages


def preprocess_speed(images: Path, total: int, repeats: int, workers: int | None) -> dict:
    """Pack the image files below `images`, repeated to `total`, `repeats` times; starting the workers counts."""
    found = sorted(path for path in images.rglob("*") if path.is_file())
    if not found:
        raise UserError(f"{images}: no image files there")
    rates = []
    with tempfile.TemporaryDirectory() as work:
        for split, count in (("train", total), ("val", 1)):
            folder = Path(work, "source", split, "n00000000")
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:06d}{found[i % len(found)].suffix}").symlink_to(found[i % len(found)].resolve())
        for repeat in range(repeats):
            began = time.perf_counter()
            manifest = preprocess(Path(work, "source"), Path(work, f"shards{repeat}"), workers)
            packed = sum(split.images for split in manifest.splits.values())
            rates.append(packed / (time.perf_counter() - began))
    return _result("preprocess", "images_per_s", rates, images=packed, left_out=manifest.rejected,
                   mean_bytes=round(statistics.mean(path.stat().st_size for path in found)))


def loader_speed(shards: Path, batch: int, batches: int, repeats: int, device: str, threads: int | None) -> dict:
    """Deliver `batches` training batches `repeats` times, as a step that takes no time would ask for them."""
    manifest, _ = load_manifest(shards)
    images = ShardImages(shards, manifest, "train")
    plan = TrainingBatches(len(images), batch, 0, Lighting.from_covariance(np.array(manifest.rgb_covariance)))
    mean = np.load(shards / manifest.mean.name, allow_pickle=False)
    device, threads = str(device_named(device)), threads or facts.usable_cores()
    rates = []
    with TrainingLoader(images, mean, plan, device, threads=threads) as loader:
        for repeat in range(repeats + 1):
            began = time.perf_counter()
            for _ in range(batches):
                pixels, _ = next(loader)
            if pixels.is_cuda:
                torch.cuda.synchronize()
            rates.append(batch * batches / (time.perf_counter() - began))
    return _result("loader", "images_per_s", rates[1:], batch=batch, threads=threads, device=device)


def step_speed(world: World, recipe: Recipe, classes: int, steps: int) -> dict:
    """Train on one made-up batch, whole network or two towers, and say how long the peer was waited for."""
    world.agree({"recipe": recipe.to_dict(), "classes": classes, "steps": steps, "code": facts.code_hash()})
    world.connect()
    network = build(recipe, classes, 0, world.exchange).to(world.device).train()
    optimizer = MomentumSGD(network.parameters(), recipe.learning_rate, recipe.momentum, recipe.weight_decay)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(recipe.batch, 3, 224, 224, generator=random).to(memory_format=torch.channels_last)
    pixels = pixels.to(world.device) * 64 * recipe.pixel_scale
    labels = torch.randint(classes, (recipe.batch,), generator=random).to(world.device)
    rates, shares = [], []
    for step in range(2 + steps):
        began, waited = time.perf_counter(), world.exchange.waited_s if world.exchange else 0.0
        optimizer.zero_grad()
        loss, _ = cross_entropy(network(pixels, step), labels, world.first_class(classes), world.exchange)
        loss.backward()
        optimizer.step()
        if pixels.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rates.append(recipe.batch / seconds)
        if world.exchange:  # the longer wait of the two towers counts
            mine = torch.tensor([world.exchange.waited_s - waited])
            theirs = world.exchange.swap(mine.to(world.device), "wait").cpu()
            shares.append(float(torch.maximum(mine, theirs)) / seconds)
    return _result("step", "images_per_s", rates[2:], recipe=recipe.name, batch=recipe.batch, processes=world.size,
                   threads=world.threads, device=str(world.device),
                   **({"transport": world.transport, "waiting_for_peer": _spread(shares[2:])} if shares else {}))


def _result(part: str, unit: str, values: list[float], **settings) -> dict:
    return {"bench": part, unit: _spread(values), **settings, "commit": facts.commit(),
            "hardware": facts.hardware(torch.device("cpu" if not torch.cuda.is_available() else "cuda"))}


def _spread(values: list[float]) -> dict:
    return {"median": float(f"{statistics.median(values):.4g}"), "min": float(f"{min(values):.4g}"),
            "max": float(f"{max(values):.4g}"), "n": len(values)}
