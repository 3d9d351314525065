"""Caffe's bvlc_alexnet: files made on the spot, and what Caffe computes of them, written out once more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

from launch.cli import cli
from launch.weights import caffe

KERNELS, NEURONS, CLASSES = (16, 24, 24, 24, 16), (40, 36), 10
SHAPES = {"conv1": (16, 3, 11, 11), "conv2": (24, 8, 5, 5), "conv3": (24, 24, 3, 3), "conv4": (24, 12, 3, 3),
          "conv5": (16, 12, 3, 3), "fc6": (40, 576), "fc7": (36, 40), "fc8": (10, 36)}
TYPES = {name: number for number, name in caffe._OLD_TYPES.items()}


def weights() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(3)
    std = {name: (2 / np.prod(shape[1:])) ** 0.5 * (0.02 if name == "conv1" else 1) for name, shape in SHAPES.items()}
    return {name: (random.normal(0, std[name], shape).astype(np.float32),
                   random.normal(0, 0.1, shape[0]).astype(np.float32)) for name, shape in SHAPES.items()}


def net(old: bool, order: list[str] | None = None, **changes):
    """A NetParameter of the layers of `order`, in the newer or the older form; `changes` are called with theirs."""
    order = order or ["Data data", "Convolution conv1", "ReLU relu1", "LRN norm1", "Pooling pool1", "Convolution conv2",
                      "ReLU relu2", "LRN norm2", "Pooling pool2", "Convolution conv3", "ReLU relu3",
                      "Convolution conv4", "ReLU relu4", "Convolution conv5", "ReLU relu5", "Pooling pool5",
                      "InnerProduct fc6", "ReLU relu6", "Dropout drop6", "InnerProduct fc7", "ReLU relu7",
                      "Dropout drop7", "InnerProduct fc8", "SoftmaxWithLoss loss"]
    made, below = caffe._message("Net")(name="AlexNet"), "data"
    for kind, name in map(str.split, order):
        layer = (made.layers if old else made.layer).add(name=name, type=TYPES[kind] if old else kind)
        if kind == "Data":
            layer.top.append("data")
            continue
        layer.bottom.append(below)
        below = below if kind in ("ReLU", "Dropout") else name
        layer.top.append(below)
        if kind == "Convolution":
            size, stride, pad, group = caffe._GEOMETRY[name]
            layer.conv_param.num_output = SHAPES[name][0]
            layer.conv_param.kernel_size.append(size)
            if stride != 1:
                layer.conv_param.stride.append(stride)
            if pad:
                layer.conv_param.pad.append(pad)
            if group != 1:
                layer.conv_param.group = group
        elif kind == "InnerProduct":
            layer.inner_product_param.num_output = SHAPES[name][0]
        elif kind == "LRN":
            layer.lrn_param.local_size, layer.lrn_param.alpha, layer.lrn_param.beta = 5, 1e-4, 0.75
        elif kind == "Pooling":
            layer.pooling_param.kernel_size.append(3)
            layer.pooling_param.stride.append(2)
        for array in weights().get(name, ()):
            blob = layer.blobs.add(data=array.ravel())
            if not old:
                blob.shape.dim.extend(array.shape)
        if name in changes:
            changes[name](layer)
    return made


def mean_bgr() -> np.ndarray:
    return np.random.default_rng(5).uniform(80, 150, (3, 256, 256)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caffe")
    for old in (False, True):
        (folder / f"{'old' if old else 'new'}.caffemodel").write_bytes(net(old).SerializeToString())
    mean = caffe._message("Blob")(num=1, channels=3, height=256, width=256, data=mean_bgr().ravel())
    (folder / "mean.binaryproto").write_bytes(mean.SerializeToString())
    (folder / "words.txt").write_text("".join(f"n{i:08d} thing {i}, or so\n" for i in range(CLASSES)))
    rng = np.random.default_rng(1)
    for n in range(2):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(folder / f"picture{n}.png")
    return folder


def alexnet(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


def import_(folder: Path, kind: str, run: Path):
    return alexnet("import", folder / f"{kind}.caffemodel", run, "--mean", folder / "mean.binaryproto", "--classes",
                   folder / "words.txt")


def in_caffe(picture: Path, ten: bool) -> torch.Tensor:
    """What Caffe makes of a picture of 256 x 256: BGR, whole-image mean, crops of 227, its layers in float64."""
    w = {name: [torch.from_numpy(array).double() for array in pair] for name, pair in weights().items()}
    bgr = np.asarray(Image.open(picture))[:, :, ::-1].transpose(2, 0, 1).astype(np.float64) - mean_bgr()
    places = [(14, 14)] if not ten else [(0, 0), (0, 29), (29, 0), (29, 29), (14, 14)]
    crops = [bgr[:, y : y + 227, x : x + 227] for y, x in places]
    crops += [crop[:, :, ::-1].copy() for crop in crops] if ten else []
    x = torch.from_numpy(np.stack(crops))

    def norm(x):  # k + alpha / n * sum, over all channels
        squares = F.pad(x**2, (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
        return x / (1 + 1e-4 / 5 * squares) ** 0.75

    def pool(x):
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    x = pool(norm(F.conv2d(x, *w["conv1"], stride=4).relu()))
    x = pool(norm(F.conv2d(x, *w["conv2"], padding=2, groups=2).relu()))
    x = F.conv2d(x, *w["conv3"], padding=1).relu()
    x = F.conv2d(x, *w["conv4"], padding=1, groups=2).relu()
    x = pool(F.conv2d(x, *w["conv5"], padding=1, groups=2).relu()).flatten(1)
    x = F.linear(F.linear(x, *w["fc6"]).relu(), *w["fc7"]).relu()
    return F.linear(x, *w["fc8"]).softmax(1).mean(0)


def probabilities(output: str) -> list[list[float]]:
    """Of each picture, in the order of the classes."""
    of_pictures = [{guess["wnid"]: guess["probability"] for guess in json.loads(line)["guesses"]}
                   for line in output.splitlines()]
    return [[found[f"n{i:08d}"] for i in range(CLASSES)] for found in of_pictures]


@pytest.mark.parametrize("kind", ["new", "old"])
@pytest.mark.parametrize("views", [1, 10])
def test_it_computes_what_caffe_computes(folder, tmp_path, torchrun, kind, views):
    done = import_(folder, kind, tmp_path / "run")
    assert done.exit_code == 0, done.output
    pictures = [folder / "picture0.png", folder / "picture1.png"]
    expected = [in_caffe(picture, views == 10).tolist() for picture in pictures]
    assert max(expected[0]) > 0.12  # not all alike
    command = ["predict", tmp_path / "run", *pictures, "--views", views, "--top", CLASSES, "--json", "--threads", "1"]
    one = probabilities(alexnet(*command).stdout)
    two = probabilities(torchrun(2, "-m", "launch.cli", *command).stdout)
    for found, other, right in zip(one, two, expected, strict=True):
        assert found == pytest.approx(right, abs=2e-6) and other == pytest.approx(right, abs=2e-6)


def test_it_can_be_exported(folder, tmp_path):
    assert import_(folder, "new", tmp_path / "run").exit_code == 0
    assert alexnet("export", tmp_path / "run", tmp_path / "net.safetensors").exit_code == 0
    assert alexnet("import", tmp_path / "net.safetensors", tmp_path / "again").exit_code == 0


def _pads_conv1(layer):
    layer.conv_param.pad.append(1)


def _averages(layer):
    layer.pooling_param.pool = 1


def _within(layer):
    layer.lrn_param.norm_region = 1


def _differs(layer):
    layer.lrn_param.k = 2


def _leaks(layer):
    layer.relu_param.negative_slope = 0.1


def _drops(layer):
    layer.dropout_param.dropout_ratio = 0.3


def _skips(layer):
    layer.bottom[0] = "conv1"


def _lacks(layer):
    del layer.blobs[1]


def _is_cut(layer):
    del layer.blobs[0].data[-5:]


@pytest.mark.parametrize(("name", "change", "told"), [
    ("conv1", _pads_conv1, "layer conv1 has another geometry"), ("pool2", _averages, "layer pool2 is no maximum"),
    ("norm1", _within, "layer norm1 is within channels"), ("norm2", _differs, "two response normalisations differ"),
    ("relu3", _leaks, "layer relu3 has a slope"), ("drop6", _drops, "layer drop6 drops another share"),
    ("conv3", _skips, "layer conv3 is not in the chain"), ("conv4", _lacks, "layer conv4 has no weights"),
    ("fc7", _is_cut, "layer fc7 has no weights"),
])
def test_other_networks_are_refused(folder, tmp_path, name, change, told):
    (tmp_path / "other.caffemodel").write_bytes(net(False, **{name: change}).SerializeToString())
    (tmp_path / "mean.binaryproto").write_bytes((folder / "mean.binaryproto").read_bytes())
    (tmp_path / "words.txt").write_bytes((folder / "words.txt").read_bytes())
    done = import_(tmp_path, "other", tmp_path / "run")
    assert done.exit_code == 2 and told in done.stderr and not (tmp_path / "run").exists()


def test_caffenet_is_refused(folder, tmp_path):
    """Caffe's other AlexNet has the same shapes but pools before it normalises."""
    order = ["Data data", "Convolution conv1", "ReLU relu1", "Pooling pool1", "LRN norm1", "Convolution conv2"]
    (tmp_path / "caffenet.caffemodel").write_bytes(net(True, order).SerializeToString())
    done = alexnet("import", tmp_path / "caffenet.caffemodel", tmp_path / "run")
    assert done.exit_code == 2 and "layer 3 of those that compute is Pooling, not LRN" in done.stderr


@pytest.mark.parametrize(("leave", "told"), [("--mean", "imagenet_mean.binaryproto"), ("--classes", "--classes")])
def test_what_it_does_not_say_is_asked_for(folder, tmp_path, leave, told):
    given = {"--mean": folder / "mean.binaryproto", "--classes": folder / "words.txt"}
    del given[leave]
    options = [word for pair in given.items() for word in pair]
    done = alexnet("import", folder / "new.caffemodel", tmp_path / "run", *options)
    assert done.exit_code == 2 and told in done.stderr


def test_files_cut_short(folder, tmp_path):
    whole = (folder / "new.caffemodel").read_bytes()
    for length in range(1, len(whole), len(whole) // 40):
        (tmp_path / "cut.caffemodel").write_bytes(whole[:length])
        done = alexnet("import", tmp_path / "cut.caffemodel", tmp_path / "run", "--mean", folder / "mean.binaryproto",
                       "--classes", folder / "words.txt")
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.output
        assert not (tmp_path / "run").exists()
