"""The index of activations: exact, fast, whole, and the same from two towers."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from launch.cli import cli
from launch.run_folder import RunFolder
from launch.similar import Index
from launch.trained import Trained
from launch.weights.bundle import bundle_of_run
from launch.weights.exporting import _config
from launch.weights.standalone import AlexNet
from pipeline.manifest import load_manifest
from pipeline.shards import ShardImages


def alexnet(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """raw/ (shards) and run/ (two steps of training)."""
    folder = tmp_path_factory.mktemp("similar")
    for arguments in (["sample", folder / "archives", "--train-per-class", "8", "--val-per-class", "2"],
                      ["preprocess", folder / "archives", folder / "raw", "--store", "raw"],
                      ["train", folder / "raw", folder / "run", "--recipe", "tiny", "--epochs", "1", "--threads", "1"]):
        done = alexnet(*arguments)
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run")).parent


def index_of(folder: Path, images: int, features: int) -> Index:
    """An index of that size, its rows still to be written."""
    run = RunFolder(folder / "run").read()
    recipe = type(run.recipe)(**{**vars(run.recipe), "neurons": (2, features)})
    trained = Trained(None, RunFolder(folder / "run"), type(run)(**{**vars(run), "recipe": recipe}),
                      Path("step-000000001"), np.zeros(0), None)
    index = Index(trained, "d" * 64, images)
    index.folder.mkdir(parents=True)
    return index


def test_search_is_exact(folder):
    random = np.random.default_rng(0)
    rows = (random.standard_normal((1000, 96)) * random.choice([1e-7, 1e-3, 1, 1e3], (1000, 1))).astype(np.float16)
    rows[400] = random.standard_normal(96)
    rows[17] = rows[400]  # equally near: the first comes first
    query = (rows[400].astype(np.float32) + random.normal(0, 1e-3, 96)).astype(np.float32)
    index = index_of(folder, *rows.shape)
    rows.tofile(index.folder / "rows.f16")
    distances = np.sqrt(((rows.astype(np.float64) - query) ** 2).sum(1))
    for threads, count in ((1, 5), (2, 5), (3, 2000)):
        found, measured = index.nearest(query, count, threads)
        expected = np.lexsort((np.arange(1000), distances.astype(np.float32)))[:count]
        assert len(found) == min(count, 1000) and found[:2].tolist() == [17, 400]
        np.testing.assert_allclose(measured, distances[found], rtol=1e-5)
        np.testing.assert_allclose(distances[found], distances[expected], rtol=1e-5)


def test_a_hundred_thousand_rows_in_a_fifth_of_a_second(folder):
    index = index_of(folder, 100_000, 4096)
    some = np.maximum(np.random.default_rng(0).standard_normal((1000, 4096)), 0).astype(np.float16)
    with open(index.folder / "rows.f16", "wb") as file:
        for _ in range(100):
            some.tofile(file)
    query, seconds = some[5].astype(np.float32), []
    for _ in range(7):
        began = time.perf_counter()
        rows, distances = index.nearest(query, 6, 2)
        seconds.append(time.perf_counter() - began)
        assert rows.tolist() == [5, 1005, 2005, 3005, 4005, 5005] and not distances.any()
    assert min(seconds) < 0.2, statistics.median(seconds)


def test_neighbours_are_those_of_the_last_hidden_layer(folder, made, torchrun, tmp_path):

    manifest, _ = load_manifest(made / "raw")
    images, validation = (ShardImages(made / "raw", manifest, split) for split in ("train", "val"))
    pictures = []
    for i in range(3):
        pictures.append(tmp_path / f"{i}.png")
        Image.fromarray(validation.stored(i)).save(pictures[-1])
    command = ["similar", folder / "run", made / "raw", *pictures, "--json", "--threads", "1", "--top", "4"]
    done = alexnet(*command)
    assert done.exit_code == 0, done.output

    bundle, hidden = bundle_of_run(folder / "run"), []
    network = AlexNet(_config(bundle))
    network.load_state_dict({**bundle.tensors, "mean": torch.from_numpy(bundle.mean)})
    network.eval().fc8.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0].detach()))
    for source in (images, validation):
        network(network.prepare(torch.from_numpy(np.stack([source.stored(i) for i in range(len(source))]))))
    all_distances = torch.cdist(hidden[1].double(), hidden[0].double())
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for picture, line, distances in zip(pictures, lines, all_distances, strict=False):
        assert line["image"] == str(picture) and len(line["similar"]) == 4
        nearest = distances.sort(stable=True)
        for one, distance in zip(line["similar"], nearest.values[:4].tolist()):
            assert one["distance"] == pytest.approx(distance, rel=5e-3)
        assert line["similar"][0]["name"] == images.name(int(nearest.indices[0]))
        label = int(images.labels[nearest.indices[0]])
        assert (line["similar"][0]["wnid"], line["similar"][0]["words"]) == (
            manifest.classes[label].wnid, manifest.classes[label].words)

    one = next((folder / "run" / "similar").iterdir())
    before = (one / "rows.f16").stat()
    assert before.st_size == 80 * 1024 * 2
    assert alexnet(*command).stdout == done.stdout and (one / "rows.f16").stat().st_mtime_ns == before.st_mtime_ns
    shutil.rmtree(one)
    of_two = [json.loads(line) for line in torchrun(2, "-m", "launch.cli", *command).stdout.splitlines()]
    assert [[n["name"] for n in line["similar"]] for line in of_two] == [
        [n["name"] for n in line["similar"]] for line in lines]


def test_a_damaged_index_is_told(folder, made, tmp_path):
    picture = tmp_path / "p.png"

    Image.new("RGB", (300, 200), (200, 20, 20)).save(picture)
    command = ["similar", folder / "run", made / "raw", picture, "--threads", "1"]
    assert alexnet(*command).exit_code == 0
    rows = next((folder / "run" / "similar").iterdir()) / "rows.f16"
    rows.write_bytes(rows.read_bytes()[:-2])
    done = alexnet(*command)
    assert done.exit_code == 2 and "damaged; remove it, and it is built again" in done.stderr
    (rows.parent / "index.json").unlink()  # as after a kill while it was built
    assert alexnet(*command).exit_code == 0 and rows.stat().st_size == 80 * 1024 * 2
