"""Speed of training batches, beside what others make of the same images in the same run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from launch.bench import loader_peers
from launch.bench.report import beside, result, spread
from launch.choice import device_named
from launch.environment import rank_and_size, usable_cores
from launch.errors import UserError
from pipeline.batches import Lighting, TrainingBatches
from pipeline.loader import TrainingLoader
from pipeline.manifest import load_manifest
from pipeline.mean import load_mean
from pipeline.shards import ShardImages


def loader_speed(
    shards: Path, batch: int, batches: int, repeats: int, device: str, threads: int | None, peers: bool = True
) -> dict:
    """Deliver `batches` training batches `repeats` times, as a step that takes no time would ask for them.

    With `peers`, every repeat measures ours and each peer in turn, all with `threads` threads or worker processes; a
    ratio is our images per second divided by the peer's in the same repeat. `source_share` is the share of our
    processor time that goes to Python: finding the images, drawing crops, flips and shifts.
    """
    if rank_and_size()[1] > 1:
        raise UserError("bench loader runs in one process: start it without torchrun")
    manifest, _ = load_manifest(shards)
    images = ShardImages(shards, manifest, "train")
    plan = TrainingBatches(len(images), batch, 0, Lighting.from_covariance(np.array(manifest.rgb_covariance)))
    mean = load_mean(shards / manifest.mean.name)
    device, threads, left_out = device_named(device), threads or usable_cores(), []
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Nobody prepares more batches than these in advance (torch's DataLoader: two a worker). They are taken before each
    # measurement and not counted, for they cost it nothing; after it there is time to prepare them again, so that no
    # contestant works while another is measured.
    in_advance = 2 * threads + 2
    with ExitStack() as stack:
        contestants = {}
        if peers:
            contestants["dataloader"] = stack.enter_context(loader_peers.dataloader(shards, mean, plan, threads))
            if find_spec("ffcv"):
                contestants["ffcv"] = stack.enter_context(loader_peers.ffcv(
                    images, manifest.rgb_mean, batch, threads, epoch=in_advance + batches
                ))
            else:
                left_out.append("ffcv: not installed")
            if images.store == "jpeg":
                for name, crop in (("dali_decode", False), ("dali_decode_crop", True)):
                    decoder = loader_peers.dali_decode(images, plan, threads, device, crop)
                    contestants[name] = stack.enter_context(closing(decoder))
            else:
                left_out.append("dali_decode: raw pixels need no decoding")
        loader = stack.enter_context(TrainingLoader(images, mean, plan, device, threads=threads))
        rates, shares = {name: [] for name in ["ours", *contestants]}, []
        for repeat in range(repeats):
            for name, contestant in [("ours", loader), *contestants.items()]:
                _seconds(contestant, in_advance)
                source_s, processor_s = loader.source_s, time.process_time()
                seconds = _seconds(contestant, batches)
                processor_s = time.process_time() - processor_s
                time.sleep(1.5 * in_advance * seconds / batches)
                rates[name].append(batch * batches / seconds)
                if name == "ours":
                    shares.append((loader.source_s - source_s) / processor_s)
    ours = rates.pop("ours")
    return result(
        "loader", "images_per_s", ours, store=images.store, batch=batch, threads=threads, device=str(device),
        source_share=spread(shares), **beside(ours, rates),
        left_out=left_out,
    )


def _seconds(contestant: Iterator, batches: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(batches):
        next(contestant)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
