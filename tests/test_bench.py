"""The benchmarks measure what they say, and `bench all` starts again where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

from launch.bench import everything, floors
from launch.bench.step_peers import stock, torchvision_shape
from launch.cli import cli
from launch.errors import UserError
from model.exchange.local import EchoExchange
from model.recipe import NOTES, TINY
from model.tower import build
from pipeline.files import locked


def bench(*arguments) -> dict:
    done = CliRunner().invoke(cli, ["bench", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def start_two(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node", "2", "-m",
                           "launch.cli", "bench", *arguments, "--threads", "1"], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)


def bench_two(*arguments) -> dict:
    done = start_two(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_step_with_an_ablation_has_no_peers():
    found = bench("step", "--recipe", "tiny", "--classes", 2, "--steps", 1, "--ablation", "no-lrn")
    assert found["ablation"] == "no-lrn" and found["peers"] == {} and found["images_per_s"]["median"] > 0
    done = CliRunner().invoke(cli, ["bench", "step", "--ablation", "no-wings"])
    assert done.exit_code == 2 and "no-wings" in done.output


def test_step_beside_peers_and_limits():
    found = bench("step", "--recipe", "tiny", "--classes", 2, "--steps", 2)
    assert found["peers"].keys() == {"stock"} and found["images_per_s"]["n"] == 2
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
    found = bench("pair", "--recipe", "tiny", "--classes", 2, "--repeats", 1, "--latency-us", 100_000)
    forward = TINY.batch * (TINY.kernels[1] // 2 * 169 + TINY.kernels[4] // 2 * 36 + sum(TINY.neurons) // 2)
    assert found["sent_bytes"] == 2 * 4 * forward
    whole, tower = found["whole"]["median"], found["tower"]["median"]
    assert found["speed_up"]["median"] == pytest.approx(tower / whole, rel=2e-3)
    assert TINY.batch / tower > 5 * 0.1  # of nine messages; the step itself takes half of one


def test_an_echo_comes_when_a_link_would_have_brought_it():
    exchange, x = EchoExchange(0, latency_s=0.05, bytes_per_s=1e6), torch.randn(12_500)  # 50 ms more
    began = time.perf_counter()
    echo = exchange.begin(x, "conv3")
    time.sleep(0.06)  # as the tower computes
    assert torch.equal(exchange.received(echo), x) and time.perf_counter() - began >= 0.1
    assert exchange.waited_s < time.perf_counter() - began - 0.055  # what was computed meanwhile is no waiting


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


HARDWARE = {"cpu": "C", "cores": 2, "memory_gib": 4, "gpu": None}


def test_all_goes_on_where_it_was(tmp_path, monkeypatch):
    measured = []

    def measure(processes, arguments):
        measured.append((processes, arguments[0]))
        if arguments[0] == "exchange" and len(measured) < 9:
            return "no peer"
        spread = {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
        return {"bench": arguments[0], "images_per_s": spread, "peers": {"stock": spread},
                "hardware": everything.facts.hardware(None)}

    monkeypatch.setattr(everything, "_measure", measure)
    monkeypatch.setattr(everything.facts, "commit", lambda: "abc")
    monkeypatch.setattr(everything.facts, "hardware", lambda device: HARDWARE)

    def measure_all(out=tmp_path / "out"):
        return everything.measure_everything(out, None, None, "tiny", "cpu", None, "rpc", lambda line: None)

    assert measure_all() == ["exchange: no peer"] and len(measured) == 8
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| images_per_s | 2 (1 to 3), n = 3 |" in page and "Failed: exchange: no peer" in page
    (tmp_path / "out" / "lrn.json").write_text("{")  # cut off
    (tmp_path / "out" / "step.json").write_text("[1]")
    measured.append(None)
    assert measure_all() == []
    assert measured[9:] == [(1, "lrn"), (1, "step"), (2, "exchange")]
    assert measure_all() == [] and len(measured) == 12
    monkeypatch.setattr(everything.facts, "commit", lambda: "def")
    measure_all()
    assert len(measured) == 12 + 8
    monkeypatch.setattr(everything.facts, "hardware", lambda device: HARDWARE | {"cores": 3})
    measure_all()
    assert len(measured) == 12 + 16
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files .mine.txt.; name another folder"):
        measure_all()
    (tmp_path / "other").mkdir()
    with locked(tmp_path / "other" / "lock", wait=False), pytest.raises(UserError, match="another `bench all` is at work"):
        measure_all(tmp_path / "other")


def test_what_cannot_be_measured_is_told_first(tmp_path):
    out = tmp_path / "out"
    for options, told in ((["--recipe", "big"], "no recipe named 'big'"), (["--device", "gpu"], "--device gpu"),
                          (["--device", "cpu", "--precision", "fp16"], "--precision fp16 is of GPUs"),
                          (["--device", "cpu", "--transport", "nccl"], "--transport nccl does not move cpu tensors"),
                          (["--device", "cpu", "--images", tmp_path / "none"], "no JPEG files there"),
                          (["--device", "cpu", "--shards", tmp_path], "manifest.json")):
        done = CliRunner().invoke(cli, ["bench", "all", *map(str, [out, *options])])
        assert done.exit_code == 2 and told in done.stderr and not out.exists(), options
    done = CliRunner().invoke(cli, ["ablate", str(tmp_path), str(out), "--device", "cpu", "--precision", "fp16"])
    assert done.exit_code == 2 and "--precision fp16 is of GPUs" in done.stderr


def test_mistakes_of_two_processes_are_told():
    for arguments, told in ((["step", "--recipe", "tiny", "--ablation", "one-tower"], "runs in one process"),
                            (["evaluate", "--recipe", "tiny", "--batch", "3"], "give an even number, or --no-peers")):
        done = start_two(*arguments)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def gpu_check(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", ROOT / "launch" / "gpu_check.sh", *arguments], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHON": sys.executable, "GIT_DIR": os.devnull,
                                            "ALEXNET_COMMIT": "0a1b2c", **environment})


def test_gpu_check_keeps_what_went_well(shards, tmp_path):
    out = tmp_path / "out"
    done = gpu_check(shards, out, DEVICE="cpu", RECIPE="tiny", PARTS="host train", LIMIT_S="1")
    assert done.returncode == 1 and not (out / "train.done").exists()
    assert "train: FAILED, ended after LIMIT_S, 1 seconds: " in (out / "summary.txt").read_text()
    done = gpu_check(shards, out, DEVICE="cpu", RECIPE="tiny", PARTS="host")
    assert done.returncode == 0 and (out / "host.done").exists()
    lines = (out / "summary.txt").read_text().splitlines()
    assert lines[0].startswith("train: FAILED, ") and lines[1].startswith("host: passed, {")
    again = gpu_check(shards, out, DEVICE="cpu", RECIPE="tiny", PARTS="host")
    assert again.returncode == 0 and "host ..." not in again.stderr
    assert (out / "summary.txt").read_text().splitlines() == lines
    held = {path: path.stat().st_mtime for path in out.iterdir()}
    for other in ({"STEPS": "5"}, {"ALEXNET_COMMIT": "d4e5f6"}):
        done = gpu_check(shards, out, **{"DEVICE": "cpu", "RECIPE": "tiny", "PARTS": "host", **other})
        assert done.returncode == 2 and "begun with other settings" in done.stderr, other
    with locked(out / "lock", wait=False):
        done = gpu_check(shards, out, DEVICE="cpu", RECIPE="tiny", PARTS="host")
        assert done.returncode == 2 and "another gpu_check.sh is at work there" in done.stderr
    assert held == {path: path.stat().st_mtime for path in out.iterdir()}  # nothing was touched
    for _ in range(2):  # what files differ from is known of no commit
        done = gpu_check(shards, tmp_path / "of files", DEVICE="cpu", PARTS="host", ALEXNET_COMMIT="0a1b2c+")
        assert done.returncode == 0 and "host ..." in done.stderr


def test_gpu_check_tells_mistakes_first(shards, tmp_path):
    out, mine = tmp_path / "out", tmp_path / "mine"
    (tmp_path / "none").mkdir()
    (mine / "run-two").mkdir(parents=True)
    (mine / "run-two" / "mine.txt").touch()
    for odd in ({"PARTS": "host dance"}, {"PARTS": "*"}, {"LIMIT_S": "abc"}, {"LIMIT_S": "0"}, {"STEPS": "-1"},
                {"RECIPE": "big"}, {"PRECISION": "fp64"}, {"TRANSPORT": "pigeon"}, {"TRANSPORT": "nccl"},
                {"DEVICE": "tpu"}, {"PYTHON": "/nope"}):
        done = gpu_check(shards, out, **{"DEVICE": "cpu", **odd})
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not out.exists(), (odd, done.stderr)
    for folders in ((tmp_path / "none", out), (shards, mine), (shards, shards / "manifest.json"), (shards, "")):
        done = gpu_check(*folders, DEVICE="cpu")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not out.exists(), (folders, done.stderr)
    assert (mine / "run-two" / "mine.txt").exists() and [path.name for path in mine.iterdir()] == ["run-two"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_gpu_check_leaves_nothing_running(shards, tmp_path, how):
    out = tmp_path / "out"
    script = subprocess.Popen(["bash", ROOT / "launch" / "gpu_check.sh", shards, out], stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "RECIPE": "tiny",
                                   "PARTS": "train", "STEPS": "100000"})
    deadline = time.monotonic() + 60
    while not (out / "run-two" / "log.jsonl").exists():  # two processes train
        assert script.poll() is None and time.monotonic() < deadline, script.communicate()
        time.sleep(0.05)
    assert len(at_work_in(out)) >= 4
    script.send_signal(how)
    _, told = script.communicate(timeout=30)
    assert how == signal.SIGKILL or script.returncode == 130 and told.endswith("alexnet: stopped in train\n")
    assert how == signal.SIGKILL or not at_work_in(out)
    deadline = time.monotonic() + 15
    while left := at_work_in(out):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert not (out / "train.done").exists()


def at_work_in(folder: Path) -> list[str]:
    """Return the command lines of the processes that are told of a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if str(folder) in line]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for arguments in (["sample", folder / "archives", "--train-per-class", "8", "--val-per-class", "2"],
                      ["preprocess", folder / "archives", folder / "shards"]):
        assert CliRunner().invoke(cli, list(map(str, arguments))).exit_code == 0
    return folder / "shards"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu(shards, tmp_path):
    done = gpu_check(shards, tmp_path / "out")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
