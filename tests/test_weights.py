"""Weights that go out and come back, and other programs' view of them: plain torch, onnxruntime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sources_on_the_spot import picture
from torch import nn

from launch.cli import cli
from launch.errors import UserError
from launch.run_folder import RunFolder
from launch.weights import standalone
from launch.weights.bundle import Bundle, bundle_of_run, write_run
from launch.weights.exporting import _config
from model.ablations import ABLATIONS, ablated
from model.recipe import NOTES, SOURCE, TINY
from model.tower import build

CLASSES = 7


def alexnet(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


def bundle_of(recipe) -> Bundle:
    network = build(recipe, CLASSES, seed=4)
    tensors = {name: parameter.detach() for name, parameter in network.named_parameters()}
    mean = np.random.default_rng(0).random((256, 256, 3), np.float32) * 255
    return Bundle(tensors, mean, recipe, [f"n{i}" for i in range(CLASSES)], [f"thing, {i}" for i in range(CLASSES)], 4,
                  30, "d" * 64)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "made_up").touch()
    write_run(bundle_of(TINY), folder / "run", folder / "made_up")
    return folder / "run"


def assert_same(one: Bundle, other: Bundle) -> None:
    assert one.describe() == other.describe() and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    np.testing.assert_array_equal(one.mean, other.mean)


@pytest.mark.parametrize("kind", ["safetensors", "onnx", "pt"])
def test_what_goes_out_comes_back(run, tmp_path, kind):
    done = alexnet("export", run, tmp_path / f"net.{kind}")
    assert done.exit_code == 0, done.output
    (tmp_path / "classes.txt").write_text("".join(f"n{i} thing, {i}\n" for i in range(CLASSES)))
    more = ["--recipe", "tiny", "--classes", tmp_path / "classes.txt"] if kind == "pt" else []
    done = alexnet("import", tmp_path / f"net.{kind}", tmp_path / "again", *more)
    assert done.exit_code == 0, done.output
    before, after = bundle_of_run(run), bundle_of_run(tmp_path / "again")
    assert_same(before, replace(after, seed=4, step=30, data="d" * 64) if kind == "pt" else after)
    assert after.step == (0 if kind == "pt" else 30)


def test_names_and_shapes_are_the_documented_ones(tmp_path):
    (tmp_path / "made_up").touch()
    write_run(bundle_of(replace(NOTES, neurons=(64, 64))), tmp_path / "run", tmp_path / "made_up")
    assert alexnet("export", tmp_path / "run", tmp_path / "net.safetensors").exit_code == 0
    assert alexnet("export", tmp_path / "run", tmp_path / "net.pt").exit_code == 0
    tensors, state = load_file(tmp_path / "net.safetensors"), torch.load(tmp_path / "net.pt", weights_only=True)
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "conv1.weight": (96, 3, 11, 11), "conv1.bias": (96,), "conv2.weight": (256, 48, 5, 5), "conv2.bias": (256,),
        "conv3.weight": (384, 256, 3, 3), "conv3.bias": (384,), "conv4.weight": (384, 192, 3, 3), "conv4.bias": (384,),
        "conv5.weight": (256, 192, 3, 3), "conv5.bias": (256,), "fc6.weight": (64, 9216), "fc6.bias": (64,),
        "fc7.weight": (64, 64), "fc7.bias": (64,), "fc8.weight": (CLASSES, 64), "fc8.bias": (CLASSES,),
        "mean": (256, 256, 3),
    }  # fmt: skip


RECIPES = [TINY, *(ablated(TINY, name) for name in ABLATIONS), replace(SOURCE, neurons=(64, 64)),
           replace(TINY, crop=227, lrn_across_towers=True)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name} {recipe.crop}")
def test_the_code_computes_what_the_network_computes(recipe):
    bundle = bundle_of(recipe)
    plain = standalone.AlexNet(_config(bundle)).double().eval()
    plain.load_state_dict({**bundle.tensors, "mean": torch.from_numpy(bundle.mean)})
    network = build(recipe, CLASSES, seed=4).double().eval()
    pixels = torch.randn(2, 3, recipe.crop, recipe.crop, dtype=torch.float64) * 60
    torch.testing.assert_close(plain(pixels), network(pixels), rtol=1e-10, atol=1e-12)


USE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import net
assert not {"launch", "model", "pipeline"} & sys.modules.keys()
images = torch.load(sys.argv[1] + "/images.pt", weights_only=True)
logits = [network(network.prepare(images)) for network in map(net.load, sys.argv[2:])]
assert torch.equal(*logits)
torch.save(logits[0], sys.argv[1] + "/logits.pt")
"""


def test_the_code_needs_nothing_of_this_project(run, tmp_path):
    for kind in ("py", "pt", "safetensors"):
        assert alexnet("export", run, tmp_path / f"net.{kind}").exit_code == 0
    images = torch.randint(0, 256, (3, 256, 256, 3), dtype=torch.uint8)
    torch.save(images, tmp_path / "images.pt")
    weights = [str(tmp_path / f"net.{kind}") for kind in ("pt", "safetensors")]
    subprocess.run([sys.executable, "-I", "-c", USE, str(tmp_path), *weights], check=True, timeout=120, cwd=tmp_path)
    bundle = bundle_of_run(run)
    pixels = (images.float() - torch.from_numpy(bundle.mean))[:, 16:240, 16:240] / 64
    expected = build(TINY, CLASSES, seed=4).eval()(pixels.permute(0, 3, 1, 2))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", [TINY, replace(SOURCE, neurons=(64, 64)), replace(TINY, towers=1, joined=())],
                         ids=["tiny", "source", "one tower"])
def test_onnxruntime_computes_the_same_for_any_number_of_images(recipe, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    bundle = bundle_of(recipe)
    (tmp_path / "made_up").touch()
    write_run(bundle, tmp_path / "run", tmp_path / "made_up")
    done = alexnet("export", tmp_path / "run", tmp_path / "net.onnx")
    assert done.exit_code == 0 and done.stdout == "", done.output
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    network = build(recipe, CLASSES, seed=4).eval()
    for images in (1, 2, 5):
        pixels = torch.randn(images, 3, 224, 224) * 64 * recipe.pixel_scale
        (logits,) = session.run(["logits"], {"pixels": pixels.numpy()})
        expected = network(pixels).detach().numpy()
        assert expected.shape == (images, CLASSES) and np.abs(expected).max() > 0.01
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_an_imported_run_is_used_as_any_other(run, tmp_path, torchrun):
    """Predictions in one process and in two, of a picture that is nobody's."""
    assert alexnet("export", run, tmp_path / "net.safetensors").exit_code == 0
    assert alexnet("import", tmp_path / "net.safetensors", tmp_path / "again").exit_code == 0
    (tmp_path / "picture.jpg").write_bytes(picture(3))
    command = ["predict", tmp_path / "again", tmp_path / "picture.jpg", "--json", "--threads", "1", "--top", "7"]
    one = json.loads(alexnet(*command).stdout)["guesses"]
    two = json.loads(torchrun(2, "-m", "launch.cli", *command).stdout)["guesses"]
    assert [guess["wnid"] for guess in one] == [guess["wnid"] for guess in two]
    assert one[0]["words"].startswith("thing, ")
    assert [guess["probability"] for guess in one] == pytest.approx([guess["probability"] for guess in two], abs=1e-5)


@pytest.mark.parametrize(("name", "content", "told"), [
    ("net.safetensors", b"", "no readable safetensors file"), ("net.safetensors", b"x" * 99, "no readable safetensors"),
    ("net.pt", b"", "no readable state_dict"), ("net.pt", b"PK\3\4 and more", "no readable state_dict"),
    ("net.onnx", b"\xff" * 50, "no readable ONNX model"), ("net.onnx", b"", "not an export of this project"),
    ("net.caffemodel", b"\xff" * 50, "not a file of Caffe's"), ("net.caffemodel", b"", "not bvlc_alexnet: layer 1"),
    ("net.bin", b"", "ends in none of .safetensors, .pt, .pth, .onnx, .caffemodel"), ("net.pt", None, "no such file"),
])
def test_what_is_no_export_is_told_and_nothing_is_made(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = alexnet("import", tmp_path / name, tmp_path / "run")
    assert done.exit_code == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


class Planted:
    def __reduce__(self):
        return (Path.touch, (Path("planted"),))


def test_a_state_dict_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Planted()}, tmp_path / "net.pt")
    done = alexnet("import", "net.pt", "run", "--recipe", "tiny")
    assert done.exit_code == 2 and "no readable state_dict" in done.stderr and not Path("planted").exists()


@pytest.mark.parametrize("changed", [
    {"step": -1}, {"step": "3"}, {"step": 10**300}, {"seed": -1}, {"wnids": 5}, {"wnids": "abcdefg"}, {"wnids": None},
    {"words": [1] * CLASSES}, {"words": ["one"]}, {"data": None}, {"recipe": 5}, {"recipe": {"schedule": 5}},
    {"recipe": {"kernels": [24.0, 64.0, 96.0, 96.0, 64.0]}}, {"recipe": {"kernels": [10**15] * 5}},
    {"recipe": {"crop": 224.5}}, {"recipe": {"lrn_k": float("nan")}}, {"format": "other"}, 5, None, "text", [],
], ids=str)
def test_descriptions_that_are_damaged_are_told(run, tmp_path, changed):
    bundle = bundle_of_run(run)
    facts = json.loads(bundle.describe())
    if isinstance(changed, dict):
        recipe = changed.get("recipe")
        facts |= changed | ({"recipe": facts["recipe"] | recipe} if isinstance(recipe, dict) else {})
    else:
        facts = changed
    tensors = {**bundle.tensors, "mean": torch.from_numpy(bundle.mean)}
    save_file(tensors, tmp_path / "net.safetensors", {"alexnet": json.dumps(facts)})
    done = alexnet("import", tmp_path / "net.safetensors", tmp_path / "run")
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize(("change", "told"), [
    (lambda tensor: tensor.to_sparse(), "no plain array"), (lambda tensor: tensor.to("meta"), "no plain array"),
    (lambda tensor: tensor + 1j, "no plain array"), (lambda tensor: tensor.double() * 1e300, "finite"),
    (lambda tensor: nn.Parameter(tensor), None), (lambda tensor: tensor.double(), None),
    (lambda tensor: tensor.bfloat16(), None),
], ids=["sparse", "meta", "complex", "too large", "parameter", "double", "bfloat16"])
@pytest.mark.parametrize("name", ["mean", "conv2.bias"])
def test_tensors_of_other_kinds(run, tmp_path, name, change, told):
    bundle = bundle_of_run(run)
    state = {**bundle.tensors, "mean": torch.from_numpy(bundle.mean)}
    state["conv2.bias"] = torch.linspace(-1, 1, 64)
    torch.save({**state, name: change(state[name])}, tmp_path / "net.pt")
    (tmp_path / "classes.txt").write_text("".join(f"n{i}\n" for i in range(CLASSES)))
    done = alexnet("import", tmp_path / "net.pt", tmp_path / "run", "--recipe", "tiny", "--classes",
                   tmp_path / "classes.txt")
    if told is None:
        assert done.exit_code == 0, done.output
    else:
        assert done.exit_code == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1, done.output
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"n1\nn1\n", b"\xff\xfe", None])
def test_files_of_classes_that_are_none(run, tmp_path, content):
    assert alexnet("export", run, tmp_path / "net.pt").exit_code == 0
    if content is None:
        os.mkfifo(tmp_path / "classes.txt")
    else:
        (tmp_path / "classes.txt").write_bytes(content)
    done = alexnet("import", tmp_path / "net.pt", tmp_path / "run", "--recipe", "tiny", "--classes",
                   tmp_path / "classes.txt")
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.output


def test_an_import_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    assert alexnet("export", run, tmp_path / "net.safetensors").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr("launch.weights.bundle.save", full)
        assert alexnet("import", tmp_path / "net.safetensors", tmp_path / "again").exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]
    assert alexnet("import", tmp_path / "net.safetensors", tmp_path / "again").exit_code == 0


def test_what_is_no_plain_file_is_not_replaced(run, tmp_path):
    os.mkfifo(tmp_path / "net.pt")
    done = alexnet("export", run, tmp_path / "net.pt")
    assert done.exit_code == 2 and "not a plain file" in done.stderr and (tmp_path / "net.pt").is_fifo()


def test_other_networks_are_refused(run, tmp_path):
    bundle = bundle_of_run(run)
    (tmp_path / "made_up").touch()
    for changed, told in [
        ({"recipe": NOTES}, r"conv1.weight is \[24, 3, 11, 11\], and \[96, 3, 11, 11\]"),
        ({"wnids": ["n1"]}, "fc8.weight"),
        ({"tensors": {}}, "lacks conv1.bias"), ({"mean": bundle.mean[:255]}, "mean image"),
        ({"tensors": bundle.tensors | {"fc9.bias": torch.zeros(1)}}, "holds fc9.bias"),
        ({"tensors": bundle.tensors | {"fc8.bias": torch.full((CLASSES,), torch.nan)}}, "not finite"),
    ]:
        with pytest.raises(UserError, match=told):
            write_run(replace(bundle, **changed), tmp_path / "run", tmp_path / "made_up")
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="holds files already"):
        write_run(bundle, run, tmp_path / "made_up")
    assert_same(bundle, bundle_of_run(run))


def test_endings_say_what_is_written(run, tmp_path):
    for name, told in (("net.bin", "ends in none of"), ("none/net.pt", "no such folder")):
        done = alexnet("export", run, tmp_path / name)
        assert done.exit_code == 2 and told in done.stderr
    assert RunFolder(run).read().wnids == [f"n{i}" for i in range(CLASSES)]
