"""`alexnet predict` against the network's own outputs on the same pixels, in one process and in two."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from launch.cli import cli
from launch.run_folder import RunFolder
from launch.trained import load_network
from launch.world import join_world
from pipeline.loader import EvaluationLoader
from pipeline.manifest import load_manifest
from pipeline.shards import ShardImages


def alexnet(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """archives/, raw/ (their shards), run/ (two steps of training) and pictures/ (validation images)."""
    folder = tmp_path_factory.mktemp("predict")
    for arguments in (["sample", folder / "archives", "--train-per-class", "8", "--val-per-class", "2"],
                      ["preprocess", folder / "archives", folder / "raw", "--store", "raw"],
                      ["train", folder / "raw", folder / "run", "--recipe", "tiny", "--epochs", "1", "--threads", "1"]):
        done = alexnet(*arguments)
        assert done.exit_code == 0, done.output
    with tarfile.open(folder / "archives" / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(folder / "pictures", filter="data")
    return folder


def guesses(done) -> dict[str, list[dict]]:
    """By the picture's name."""
    lines = map(json.loads, done.stdout.splitlines())
    return {Path(line["image"]).name: line["guesses"] for line in lines}


@pytest.mark.parametrize("views", [1, 10])
def test_probabilities_are_the_networks(folder, views):
    pictures = sorted((folder / "pictures").iterdir())
    done = alexnet("predict", folder / "run", *pictures, "--views", views, "--top", 10, "--json")
    assert done.exit_code == 0, done.output
    found = guesses(done)
    assert len(found) == 20

    manifest, _ = load_manifest(folder / "raw")
    images, run_folder = ShardImages(folder / "raw", manifest, "val"), RunFolder(folder / "run")
    run = run_folder.read()
    with join_world(device="cpu", transport="rpc", timeout_s=60, threads=1) as world:
        network = load_network(run_folder.last_checkpoint(run), run, world).eval()
    batches = EvaluationLoader(images, run_folder.mean(run), views, 7,
                               scale=run.recipe.pixel_scale)
    with torch.no_grad():
        expected = torch.cat([network(pixels).softmax(1).unflatten(0, (-1, views)).mean(1) for pixels, _ in batches])
    for i in range(20):
        chances, labels = expected[i].sort(descending=True)
        of_image = found[images.name(i)]
        assert [guess["probability"] for guess in of_image] == pytest.approx(chances.tolist(), abs=1e-6)
        assert {g["wnid"]: g["words"] for g in of_image} == {c.wnid: c.words for c in manifest.classes}
        assert of_image[0]["wnid"] == manifest.classes[labels[0]].wnid


def test_two_towers_see_what_the_whole_network_sees(folder, torchrun):
    pictures = sorted((folder / "pictures").iterdir())[:5]
    command = ["predict", folder / "run", *pictures, "--json", "--threads", "1"]
    one, two = guesses(alexnet(*command)), guesses(torchrun(2, "-m", "launch.cli", *command))
    assert one.keys() == two.keys() and len(one) == 5
    for name in one:
        assert [guess["wnid"] for guess in one[name]] == [guess["wnid"] for guess in two[name]]
        for mine, theirs in zip(one[name], two[name]):
            assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-5)


def test_what_is_no_picture_is_named_and_the_rest_seen(folder, tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    picture = min((folder / "pictures").iterdir())
    done = alexnet("predict", folder / "run", tmp_path / "page.jpg", picture, tmp_path / "none.png", "--top", "2")
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"alexnet: {tmp_path / 'page.jpg'}: not an image of a known format; left out",
        f"alexnet: {tmp_path / 'none.png'}: No such file or directory; left out",
    ]
    name, *lines = done.stdout.splitlines()
    assert name == str(picture) and len(lines) == 2 and all("%  n" in line for line in lines)


def test_without_a_checkpoint(folder, tmp_path):
    run = RunFolder(folder / "run").read()
    RunFolder(tmp_path / "new").create(run, (folder / "run" / "mean.npy").read_bytes())
    done = alexnet("predict", tmp_path / "new", min((folder / "pictures").iterdir()))
    assert done.exit_code == 2 and "no checkpoint there yet; train first" in done.stderr
