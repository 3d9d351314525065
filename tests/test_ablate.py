"""`alexnet ablate`: the table's arithmetic, and a small matrix that is stopped and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from launch.ablation import matrix
from launch.ablation.table import BASE, Outcome, rows
from launch.cli import cli
from launch.errors import RunFailed
from launch.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent


def alexnet(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablate")
    for arguments in (["sample", folder / "archives", "--train-per-class", "8", "--val-per-class", "2"],
                      ["preprocess", folder / "archives", folder / "shards"]):
        assert alexnet(*arguments).exit_code == 0
    return folder / "shards"


def test_rises_are_against_the_base_of_the_same_seed():
    found = [
        Outcome(BASE, 0, (0.40, 0.10), (0.43, 0.12), 50), Outcome(BASE, 1, (0.36, 0.08), (0.38, 0.09), 50),
        Outcome("no-lrn", 0, (0.42, 0.09), (0.5, 0.2), 50), Outcome("no-lrn", 1, (0.40, 0.10), (0.5, 0.2), 50),
        Outcome("tanh", 0, (0.50, 0.20), (0.5, 0.2), 50), Outcome("tanh", 7, (0.90, 0.90), (0.9, 0.9), 50),
    ]
    table = {row.name: row for row in rows(found)}
    assert list(table) == ["no-lrn", "tanh", "centre"]
    lrn = table["no-lrn"]
    assert (lrn.n, lrn.top1, lrn.top5) == (2, pytest.approx(3.0), pytest.approx(0.5))
    assert (lrn.top1_std, lrn.top5_std) == (pytest.approx(2**0.5), pytest.approx(1.5 * 2**0.5))
    assert (lrn.paper_top1, lrn.paper_top5) == (1.4, 1.2)
    assert (table["tanh"].n, table["tanh"].top1, table["tanh"].top1_std) == (1, pytest.approx(10.0), None)
    assert (table["centre"].n, table["centre"].top1) == (2, pytest.approx(2.5))


def test_a_matrix_that_is_killed_goes_on(shards, tmp_path):
    """Killed outright while the second run trains; the first is not trained again, and nothing trains on behind us."""
    out = tmp_path / "out"
    command = ["ablate", shards, out, "--recipe", "tiny", "--epochs", "1", "--only", "one-tower", "--threads", "1",
               "--transport", "gloo"]
    started = subprocess.Popen([sys.executable, "-m", "launch.cli", *map(str, command)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    second = out / "runs" / "one-tower-seed0" / "run.json"
    deadline = time.monotonic() + 120
    while not second.exists():
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    base = (out / "runs" / "base-seed0" / "log.jsonl").read_bytes()
    time.sleep(1)
    log = second.with_name("log.jsonl")
    before = log.read_bytes() if log.exists() else b""
    time.sleep(2)
    assert (log.read_bytes() if log.exists() else b"") == before

    done = alexnet(*command)
    assert done.exit_code == 0, done.output
    assert (out / "runs" / "base-seed0" / "log.jsonl").read_bytes() == base
    table = json.loads((out / "table.json").read_text())
    assert [(row["name"], row["n"]) for row in table["rows"]] == [("one-tower", 1), ("centre", 1)]
    assert done.stdout == (out / "table.md").read_text() and "| one tower: " in done.stdout
    recipe = RunFolder(out / "runs" / "one-tower-seed0").read().recipe
    assert (recipe.towers, recipe.epochs, recipe.name) == (1, 1, "tiny one-tower")
    for name, towers in ("base", 2), ("one-tower", 1):
        start = json.loads((out / "runs" / f"{name}-seed0" / "log.jsonl").read_text().splitlines()[0])
        assert start["processes"] == towers
    errors = json.loads((out / "runs" / "one-tower-seed0" / "errors.json").read_text())
    assert table["rows"][0]["top1"] == pytest.approx(
        100 * (errors["ten_views"][0] - table["base"][0]["ten_views"][0]))
    with Image.open(out / "table.png") as picture:
        assert min(picture.size) > 200
    assert (out / "table.svg").read_text().rstrip().endswith("</svg>")

    again = alexnet(*command)  # nothing is left to do
    assert again.exit_code == 0 and again.stdout == done.stdout and "run 1 of" not in again.stderr
    other = alexnet("ablate", shards, out, "--recipe", "tiny", "--epochs", "2", "--only", "no-conv4")
    assert other.exit_code == 2 and "begun with epochs 1; choose another folder" in other.stderr


def test_a_network_that_diverges_does_not_stop_the_others(shards, tmp_path, monkeypatch):
    """Its training ends with exit code 1, as when the loss is not finite; the table lacks it and has the rest."""
    alexnet_, out = matrix._alexnet, tmp_path / "out"

    def failing(processes, command, *arguments):
        if command == "train" and "no-lrn" in map(str, arguments):
            raise RunFailed("train of no-lrn ended with exit code 1")
        return alexnet(command, *arguments).stdout  # in this process: the others have their own in the test above

    monkeypatch.setattr(matrix, "_alexnet", failing)
    done = alexnet("ablate", shards, out, "--recipe", "tiny", "--epochs", "1", "--only", "no-lrn,no-conv4",
                   "--processes", "1")
    assert done.exit_code == 1 and "lacks 1 of 3 runs: train of no-lrn ended with exit code 1" in done.stderr
    assert [row["name"] for row in json.loads((out / "table.json").read_text())["rows"]] == ["no-conv4", "centre"]
    assert RunFolder(out / "runs" / "no-conv4-seed0").read().recipe.left_out == ("conv4",)
    monkeypatch.setattr(matrix, "_alexnet", alexnet_)
    errors = out / "runs" / "no-conv4-seed0" / "errors.json"
    good = json.loads(errors.read_text())
    for bad in (5, [], {"name": "no-conv4"}, good | {"ten_views": "ab"}, good | {"centre": [float("nan"), 0]},
                good | {"name": "tanh"}, good | {"seed": [1]}):
        errors.write_text(json.dumps(bad))
        done = alexnet("ablate", shards, out, "--recipe", "tiny", "--epochs", "1", "--only", "no-conv4")
        assert done.exit_code == 2 and "damaged; remove it" in done.stderr, bad
    for bad in ("[1]", "5", "null", "{}", "{"):
        (out / "matrix.json").write_text(bad)
        done = alexnet("ablate", shards, out, "--recipe", "tiny", "--epochs", "1", "--only", "no-conv4")
        assert done.exit_code == 2 and "matrix.json: damaged" in done.stderr


def test_what_cannot_be_run_is_told_before_anything_is_made(shards, tmp_path):
    for arguments, told in (
        (["--only", "no-relu"], "no ablation named 'no-relu'"), (["--recipe", "big"], "no recipe named 'big'"),
        (["--only", ""], "no ablation named ''"),
    ):
        done = alexnet("ablate", shards, tmp_path / "out", *arguments)
        assert done.exit_code == 2 and told in done.stderr and not (tmp_path / "out").exists()
    (tmp_path / "mine.txt").write_text("mine")
    done = alexnet("ablate", shards, tmp_path)
    assert done.exit_code == 2 and "no matrix of ablations" in done.stderr


def test_one_tower_trains_in_one_process_only(shards, tmp_path, torchrun):
    command = ["-m", "launch.cli", "train", shards, tmp_path / "run", "--recipe", "tiny", "--ablation", "one-tower"]
    done = torchrun(2, *command, check=False)
    assert done.returncode != 0 and "a network of one tower runs in one process" in done.stderr
    assert not (tmp_path / "run").exists()
