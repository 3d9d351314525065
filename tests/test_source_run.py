"""A small training by the rules of the authors' program: what its schedule changes on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from launch.cli import cli
from launch.runlog import read_log
from model.network import AlexNet
from model.recipe import RECIPES, SOURCE, TINY
from model.schedule import ByHand
from pipeline.batches import Lighting, TrainingBatches
from pipeline.loader import TrainingLoader
from pipeline.manifest import load_manifest
from pipeline.shards import ShardImages

SMALL = replace(
    SOURCE, name="small", kernels=TINY.kernels, neurons=TINY.neurons, weight_std=(), ones=(), pixel_scale=1 / 64,
    batch=40, epochs=4, colour_epochs=1, learning_rate=0.01,
    schedule=ByHand(drops=(1,), conv1_slows=2, conv1_rate=1e-5, conv1_freezes=3),
)  # 80 images: two steps an epoch


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for arguments in (["sample", folder / "archives", "--train-per-class", "8", "--val-per-class", "1"],
                      ["preprocess", folder / "archives", folder / "shards"]):
        assert CliRunner().invoke(cli, list(map(str, arguments))).exit_code == 0
    return folder / "shards"


def test_a_run_by_the_rules_of_the_authors_program(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "small", SMALL)
    seen, forward = [], AlexNet.forward

    def watched(self, images, step=0):
        if self.training:
            seen.append((images.clone(), self.conv1.weight.detach().clone(), self.conv2.weight.detach().clone()))
        return forward(self, images, step)

    monkeypatch.setattr(AlexNet, "forward", watched)
    done = CliRunner().invoke(cli, ["train", str(shards), str(tmp_path / "run"), "--recipe", "small", "--threads", "1"])
    assert done.exit_code == 0, done.output
    rates = [record["rate"] for record in read_log(tmp_path / "run" / "log.jsonl") if record["event"] == "steps"]
    assert rates[0] == pytest.approx(0.01) and rates[-1] == pytest.approx(0.001)

    manifest, _ = load_manifest(shards)
    lighting = Lighting.from_covariance(np.array(manifest.rgb_covariance), 0.1, by="deviation")
    batches = TrainingBatches(80, 40, 0, lighting, 1, crops_shared_by=32, mean_at="centre")
    images, mean = ShardImages(shards, manifest, "train"), np.load(shards / "mean.npy")
    with TrainingLoader(images, mean, batches, scale=1 / 64) as loader:
        for (given, *_), (pixels, _), step in zip(seen, loader, range(8)):
            torch.testing.assert_close(given, pixels / 1.1 if step < 2 else pixels, rtol=1e-6, atol=0)
    assert len(seen) == 8

    moved = [[float((after - before).abs().max()) for before, after in zip(weights, weights[1:])]
             for weights in zip(*(weights for _, *weights in seen))]
    conv1, conv2 = moved  # step after step
    assert conv1[0] > 0 and conv2[-1] > 0
    velocity = conv1[5]  # the last step at its slow rate; frozen, it only coasts
    assert conv1[6] == pytest.approx(0.9 * velocity, rel=0.01)
