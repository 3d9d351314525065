"""The benchmarks measure what they say, and `bench all` starts again where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

from launch.bench import everything, floors
from launch.bench.step_peers import stock, torchvision_shape
from launch.cli import cli
from model.exchange.local import EchoExchange
from model.recipe import NOTES, TINY
from model.tower import build


def bench(*arguments) -> dict:
    done = CliRunner().invoke(cli, ["bench", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def bench_two(*arguments) -> dict:
    done = subprocess.run([sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node", "2", "-m",
                           "launch.cli", "bench", *arguments, "--threads", "1"], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_step_with_an_ablation_has_no_peers():
    found = bench("step", "--recipe", "tiny", "--classes", 2, "--steps", 1, "--ablation", "no-lrn")
    assert found["ablation"] == "no-lrn" and found["peers"] == {} and found["images_per_s"]["median"] > 0
    done = CliRunner().invoke(cli, ["bench", "step", "--ablation", "no-wings"])
    assert done.exit_code == 2 and "no-wings" in done.output


def test_step_beside_peers_and_limits():
    found = bench("step", "--recipe", "tiny", "--classes", 2, "--steps", 2)
    assert found["peers"].keys() == {"stock", "torchvision_shape"} and found["images_per_s"]["n"] == 2
    seconds = TINY.batch / found["images_per_s"]["median"]
    assert found["of_arithmetic"]["median"] == pytest.approx(found["arithmetic_s"] / seconds, rel=0.5)


def test_two_processes_beside_ddp():
    found = bench_two("step", "--recipe", "tiny", "--classes", "2", "--steps", "1")
    assert found["processes"] == 2 and found["peers"].keys() == {"ddp"}
    assert 0 <= found["waiting_for_peer"]["median"] < 1


def test_exchange_of_every_message():
    found = bench_two("exchange", "--recipe", "tiny", "--repeats", "2")
    assert {name: message["mib"] for name, message in found["messages"].items()} == {
        "conv3": 0.66, "fc6": 0.14, "fc7": 0.06, "fc8": 0.06}


def test_two_devices_are_modelled_from_what_was_measured():
    found = bench("pair", "--recipe", "tiny", "--classes", 2, "--repeats", 1, "--link-gb-s", 0.5, "--latency-us", 1000)
    forward = TINY.batch * (TINY.kernels[1] // 2 * 169 + TINY.kernels[4] // 2 * 36 + sum(TINY.neurons) // 2)
    assert found["sent_bytes"] == 2 * 4 * forward
    whole, tower = found["whole"]["median"], found["tower"]["median"]
    assert found["speed_up"]["median"] == pytest.approx(tower / whole, rel=2e-3)
    # Forward nothing hides a message, and those of the loss and of four gradients have little to hide behind.
    assert TINY.batch / tower > 5 * 1e-3 + found["sent_bytes"] / 2 / 0.5e9


def test_an_echo_comes_when_a_link_would_have_brought_it():
    exchange, x = EchoExchange(0, latency_s=0.05, bytes_per_s=1e6), torch.randn(12_500)  # 50 ms more
    began = time.perf_counter()
    echo = exchange.begin(x, "conv3")
    time.sleep(0.06)  # as the tower computes
    assert torch.equal(exchange.received(echo), x) and 0.1 <= time.perf_counter() - began < 0.15
    assert exchange.waited_s < 0.045


def test_evaluate_and_lrn():
    found = bench("evaluate", "--recipe", "tiny", "--classes", 2, "--batch", 2, "--repeats", 1)
    assert found["views"] == 10 and found["peers"].keys() == {"stock"}
    for precision in ("fp32", "bf16"):
        found = bench("lrn", "--recipe", "tiny", "--repeats", 1, "--precision", precision)
        assert found["layer2"]["shape"] == [TINY.batch, TINY.kernels[1], 27, 27] and found["layer1"]["torch"]


def test_work_of_a_step_is_that_of_the_notes():
    """724 million multiplications an image forward; of gradients of images (105 million) there are none."""
    operations, moved = floors.step_work(NOTES, 1000, number_bytes=4)
    assert operations / (2 * NOTES.batch) == pytest.approx(3 * 724e6 - 105e6, rel=0.001)
    assert moved > 5 * 4 * 60_965_224 + 3 * 4 * 60_965_224


def test_peers_have_the_networks_shape():
    torchs = stock(NOTES, 1000)
    ours = {p.shape for p in build(NOTES, 1000, 0).parameters()}
    assert {p.shape for p in torchs.parameters()} == ours
    assert sum(p.numel() for p in torchvision_shape(1000).parameters()) == 61_100_840  # as torchvision's own has
    image = torch.zeros(1, 3, 224, 224)
    assert torchs(image).shape == (1, 1000) and torchvision_shape(7)(image).shape == (1, 7)


def test_all_goes_on_where_it_was(tmp_path, monkeypatch):
    measured = []

    def measure(processes, arguments):
        measured.append((processes, arguments[0]))
        if arguments[0] == "exchange" and len(measured) < 9:
            return "no peer"
        spread = {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
        return {"bench": arguments[0], "images_per_s": spread, "peers": {"stock": spread},
                "hardware": {"cpu": "C", "cores": 2, "memory_gib": 4, "gpu": None}}

    monkeypatch.setattr(everything, "_measure", measure)
    monkeypatch.setattr(everything.facts, "commit", lambda: "abc")
    settings = ["--recipe", "tiny"]
    failed = everything.measure_everything(tmp_path / "out", None, None, settings, [], [], lambda line: None)
    assert failed == ["exchange: no peer"] and len(measured) == 8
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| images_per_s | 2 (1 to 3), n = 3 |" in page and "Failed: exchange: no peer" in page
    (tmp_path / "out" / "lrn.json").write_text("{")  # cut off
    measured.append(None)
    assert everything.measure_everything(tmp_path / "out", None, None, settings, [], [], lambda line: None) == []
    assert measured[9:] == [(1, "lrn"), (2, "exchange")]
    monkeypatch.setattr(everything.facts, "commit", lambda: "def")
    everything.measure_everything(tmp_path / "out", None, None, settings, [], [], lambda line: None)
    assert len(measured) == 11 + 8


def gpu_check(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", ROOT / "launch" / "gpu_check.sh", *arguments], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHON": sys.executable, **environment})


def test_gpu_check_keeps_what_went_well(tmp_path):
    shards, out = tmp_path / "shards", tmp_path / "out"
    shards.mkdir()
    assert gpu_check(shards, out).returncode == 2 and not out.exists()  # no manifest
    (shards / "manifest.json").touch()
    done = gpu_check(shards, out, DEVICE="cpu", PARTS="host train")
    assert done.returncode == 1 and (out / "host.done").exists() and not (out / "train.done").exists()
    lines = (out / "summary.txt").read_text().splitlines()
    assert lines[0].startswith("host: passed, {") and lines[1].startswith("train: FAILED, alexnet: ")
    again = gpu_check(shards, out, DEVICE="cpu", PARTS="host")
    assert again.returncode == 0 and "host ..." not in again.stderr
    assert sorted((out / "summary.txt").read_text().splitlines()) == sorted(lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu(tmp_path):
    (tmp_path / "manifest.json").touch()
    done = gpu_check(tmp_path, tmp_path / "out")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
