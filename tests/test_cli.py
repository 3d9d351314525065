"""The command line: results on stdout, one line and exit code 2 for a user's mistake, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image

from launch.cli import cli
from model.recipe import RECIPES


def alexnet(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "archives"
    assert alexnet("sample", folder, "--train-per-class", 3, "--val-per-class", 1).exit_code == 0
    return folder


@pytest.fixture
def source(archives, tmp_path) -> Path:
    return Path(shutil.copytree(archives, tmp_path / "source"))


def test_the_way_from_sample_to_verified_shards(archives, tmp_path):
    done = alexnet("preprocess", archives, tmp_path / "shards", "--workers", 1)
    assert done.exit_code == 0
    assert f"{tmp_path / 'shards'}: 30 train, 10 val images of 10 classes\n" in done.stdout
    verified = alexnet("verify", tmp_path / "shards")
    assert verified.exit_code == 0 and "whole: 30 train, 10 val images of 10 classes" in verified.stdout


def fails(line: str, *arguments) -> None:
    done = alexnet(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (told,) = done.stderr.strip().splitlines()
    assert told.startswith("alexnet: ") and line in told


def test_sample_overwrites_nothing(archives):
    before = {path: path.read_bytes() for path in archives.iterdir()}
    fails("ILSVRC2012_img_train.tar", "sample", archives)
    assert before == {path: path.read_bytes() for path in archives.iterdir()}


def test_missing_source(tmp_path):
    fails("nothing", "preprocess", tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_devkit(source, tmp_path):
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    fails("ILSVRC2012_devkit_t12.tar.gz", "preprocess", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_archive(source, tmp_path):
    archive = source / "ILSVRC2012_img_train.tar"
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    fails("ILSVRC2012_img_train.tar", "preprocess", source, tmp_path / "out", "--workers", 1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_shards_are_not_overwritten(archives, tmp_path):
    out = tmp_path / "shards"
    alexnet("preprocess", archives, out, "--workers", 1)
    before = {path: path.read_bytes() for path in out.iterdir()}
    fails("already holds shards, of another source or with other options", "preprocess", archives, out, "--seed", 1)
    fails("already holds shards", "preprocess", archives, out, "--store", "raw")
    assert alexnet("preprocess", archives, out).exit_code == 0  # nothing is left to do
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_an_image_of_zero_bytes_is_listed_and_left_out(tmp_path):
    source = tmp_path / "folders"
    for split in ("train", "val"):
        (source / split / "n00000001").mkdir(parents=True)
        for i in range(2):
            Image.linear_gradient("L").save(source / split / "n00000001" / f"{i}.JPEG")
    (source / "train" / "n00000001" / "empty.JPEG").write_bytes(b"")
    done = alexnet("preprocess", source, tmp_path / "out", "--workers", 1)
    assert done.exit_code == 0
    assert "2 train, 2 val images of 1 classes; 1 left out" in done.stdout
    (entry,) = (json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert entry["member"].endswith("empty.JPEG") and entry["reason"] == "empty file"


def test_unknown_recipe(tmp_path):
    fails("no recipe named 'big'; there are notes, paper, source, tiny",
          "train", tmp_path, tmp_path / "run", "--recipe", "big")


def test_help_names_every_command():
    shown = alexnet("--help").stdout
    for command in ("sample", "inspect", "preprocess", "verify", "recipes", "train", "evaluate", "predict", "bench"):
        assert command in shown


def test_out_inside_the_source(source):
    fails("lies in the source", "preprocess", source, source / "out")
    assert not (source / "out").exists()


def test_an_option_that_is_no_number(tmp_path):
    done = alexnet("train", tmp_path, tmp_path / "run", "--timeout", "nan")
    assert done.exit_code == 2 and "nan is not a number" in done.stderr


@pytest.mark.parametrize("path, value", [
    (["classes"], []), (["classes", 0, "wnid"], None), (["image_size"], 224), (["splits", "train", "images"], 29),
    (["splits", "val", "class_counts", 0], -1), (["splits", "train", "files", 0, "name"], "../train-00000.arrow"),
    (["splits", "train", "files", 0, "bytes"], None), (["mean", "bytes"], "x"), (["mean", "sha256"], 7),
    (["rgb_covariance", 0, 0], -1.0), (["rgb_covariance", 0, 0], {}), (["format"], "a\nb"),
])  # fmt: skip
def test_a_damaged_manifest_is_told_in_one_line(small_shards, tmp_path, path, value):
    folder = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    fields = json.loads((folder / "manifest.json").read_text())
    place = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(fields))
    fails("manifest.json: ", "verify", folder)


def test_a_manifest_that_counts_other_labels(small_shards, tmp_path):
    folder = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    fields = json.loads((folder / "manifest.json").read_text())
    counts = fields["splits"]["val"]["class_counts"]
    counts[0], counts[1] = 2, 0
    (folder / "manifest.json").write_text(json.dumps(fields))
    fails("the labels of val are not those that its manifest counts", "verify", folder)


@pytest.fixture(scope="session")
def small_shards(archives, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small") / "shards"
    assert alexnet("preprocess", archives, out, "--workers", 1).exit_code == 0
    return out


def test_inspect_says_what_there_is_and_writes_nothing(source, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = alexnet("inspect", source)
    assert done.exit_code == 0 and done.stdout.splitlines() == [
        f"{source}: ilsvrc2012, 10 classes", "  train: 30 images of 10 classes, 3 each",
        "  val: 10 images of 10 classes, 1 each",
    ]
    found = json.loads(alexnet("inspect", source, "--json").stdout)
    assert found["layout"] == "ilsvrc2012" and found["splits"]["train"] == {
        "images": 30, "refused": 0, "classes": 10, "fewest": 3, "most": 3
    }
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_inspect_says_that_val_images_will_be_held_out(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"not looked at")
    assert alexnet("inspect", tmp_path).stdout.splitlines() == [
        f"{tmp_path}: class-folders, 1 classes", "  train: 1 images of 1 classes, 1 each",
        "  val: none; preprocess holds out some of the training images",
    ]


def test_archives_that_are_not_the_published_ones(source, tmp_path):
    for command in (["inspect", source], ["preprocess", source, tmp_path / "out"]):
        fails("published is ", *command, "--check-md5")
    assert not (tmp_path / "out").exists()


def test_a_reader_that_has_seen_enough():
    with subprocess.Popen([sys.executable, "-m", "launch.cli", "recipes"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=ROOT) as done:
        done.stdout.close()
        assert done.stderr.read() == b"" and done.wait(60) == 1


def test_what_is_half_done_goes_when_a_command_is_asked_to_end(tmp_path):
    program = ("import sys, time\nfrom pathlib import Path\nfrom launch import cli\n"
               "from pipeline.files import creating\nplace = Path(sys.argv[1])\n"
               "@cli.cli.command()\ndef slow():\n    with creating(place):\n"
               "        print('begun', flush=True)\n        time.sleep(60)\n"
               "sys.argv = ['alexnet', 'slow']\ncli.main()")
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "file"], cwd=ROOT, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout.readline() == "begun\n" and len(list(tmp_path.iterdir())) == 1
        process.terminate()
        assert process.wait(30) == 143 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, ends", [("ESTALE", ""), ("EIO", ""), ("ENOENT", "for good\n")])
def test_what_may_pass_is_tried_again_and_a_mistake_is_not(name, ends):
    program = ("import errno, sys\nfrom launch import cli\nnumber = getattr(errno, sys.argv[1])\n"
               "def failing(**_):\n    raise OSError(number, 'of the disk', 'file')\n"
               "cli.recipes.recipes.callback = failing\ncli.end_job = lambda code: print('for good')\n"
               "sys.argv = ['alexnet', 'recipes']\ncli.main()")
    done = subprocess.run([sys.executable, "-c", program, name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, ends, "alexnet: file: of the disk\n")


def test_an_empty_name_is_not_this_folder(tmp_path):
    for arguments in (["inspect", ""], ["preprocess", "", tmp_path], ["preprocess", tmp_path, ""], ["verify", ""]):
        done = alexnet(*arguments)
        assert done.exit_code == 2 and "an empty name" in done.stderr
    done = alexnet("doctor", "--quick", "--run", "s3://bucket/run")
    assert done.exit_code == 2 and "s3://bucket/run is no path of this machine" in done.stderr


def test_warnings_say_whose_they_are(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/1.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 300), "red").save(tmp_path / "data" / name)
    command = [sys.executable, "-m", "launch.cli", "preprocess", tmp_path / "data", tmp_path / "out",
               "--check-md5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-2:] == [
        f"alexnet: {tmp_path / 'data'}: no MD5 was compared, for none is published of what lies there",
        "alexnet: 1 of 2 classes have no usable val image: b",
    ]


def test_closed_streams(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"x")
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m launch.cli inspect {tmp_path} 2>&-"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "1 images of 1 classes" in done.stdout and "Traceback" not in done.stdout


def test_recipes_side_by_side():
    lines = alexnet("recipes").stdout.splitlines()
    assert lines[0].split() == ["notes", "paper", "source", "tiny"]
    rows = {line.split()[0]: line for line in lines[1:] if line}
    assert re.split("  +", next(line for line in lines if line.startswith("ones "))) == [
        "ones", "conv2 conv3 conv5 fc6 fc7 fc8", "* conv2 conv4 conv5 fc6 fc7", "* conv2 conv4 conv5 fc6 fc7", "* none"
    ]
    batch = next(line for line in lines if line.startswith("batch "))
    assert re.split("  +", batch) == ["batch", "128", "128", "128", "* 32"]
    assert rows["batch"].endswith("images a step")
    assert json.loads(alexnet("recipes", "--json").stdout) == {name: r.to_dict() for name, r in RECIPES.items()}


def test_an_unknown_layout_names_those_that_are_known(tmp_path):
    (tmp_path / "notes.txt").write_text("no images")
    for layout in ("ilsvrc2012", "ilsvrc2010", "kaggle", "tiny-imagenet", "hugging-face-parquet", "synset-tars",
                   "webdataset", "class-folders"):
        fails(layout, "inspect", tmp_path)
