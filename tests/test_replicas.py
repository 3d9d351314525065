"""Replicas, of the pair of towers and of the whole network, on one host and on two: all learn what one network does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from conftest import PROGRAMS, ROOT

from launch.cli import cli
from launch.errors import STOPPED
from launch.runlog import read_log
from model.batch_rule import with_batch
from model.errors import RecipeError
from model.layers import Dropout
from model.optimizer import optimizer_of, set_rates
from model.recipe import NOTES, SOURCE, TINY
from model.schedule import Moment, Progress
from model.tower import build

# Recipe, dropout, type, classes, images a step (of all replicas), transport, device; see tests/programs.
COMPARISON = ["tiny", "0.5", "float64", "7", "12", "rpc", "cpu"]


def check(output: str, processes: int) -> None:
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert sorted(record["rank"] for record in records) == list(range(processes)), output
    for record in records:
        assert len(record["loss"]) == 5 and max(record["loss"] + record["gradient"] + record["weight"]) < 1e-12, record


@pytest.mark.parametrize("processes, whole", [(6, []), (3, ["whole"])])
def test_replicas_equal_one_network(torchrun, processes, whole):
    check(torchrun(processes, "compare_towers.py", *COMPARISON, *whole).stdout, processes)


@pytest.fixture
def two_hosts():
    """The names of two network namespaces, joined by a veth pair: 10.77.0.1 and 10.77.0.2 are all that they share."""
    names = [f"alexnet-{os.getpid()}-{host}" for host in (1, 2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    try:
        ends = [f"ax{os.getpid() % 100000}{host}" for host in "ab"]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(names: list[str], number: int, torchrun: list[str], *words: str) -> subprocess.Popen:
    """Start a program under launch.torchrun on host 0 or 1."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        environment.pop(variable, None)
    command = ["ip", "netns", "exec", names[number], sys.executable, "-m", "launch.torchrun", "--rdzv-backend=c10d",
               "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=test", f"--local-addr=10.77.0.{number + 1}",
               f"--rdzv-conf=is_host={number == 0},last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3",
               *torchrun, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                            env=environment, start_new_session=True)


def test_two_hosts_equal_one_network(two_hosts):
    hosts = [start(two_hosts, number, ["--nnodes=2", "--nproc-per-node=2"], PROGRAMS / "compare_towers.py", *COMPARISON)
             for number in (0, 1)]
    told = [host.communicate(timeout=150) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    check("".join(output for output, _ in told), 4)


def test_a_host_that_leaves_and_comes_back(two_hosts, shards, tmp_path):
    """Its replica is done without, and then taken in again: the run goes on from its checkpoint each time."""
    run = tmp_path / "run"
    words = ["-m", "launch.cli", "train", shards, run, "--recipe", "tiny", "--epochs", "500", "--whole", "--threads",
             "1", "--checkpoint-minutes", "0.05"]

    def begin(number: int) -> subprocess.Popen:
        return start(two_hosts, number, ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=9"], *words)

    def records() -> list[dict]:
        return read_log(run / "log.jsonl") if (run / "log.jsonl").exists() else []

    def wait_for(replicas: int) -> None:
        """Until so many replicas have trained and written a checkpoint, after whatever was before."""
        deadline = time.monotonic() + 100
        while True:
            found = records()
            begun = [i for i, record in enumerate(found) if record["event"] in ("start", "resume")]
            if begun and found[begun[-1]]["replicas"] == replicas and any(
                record["event"] == "checkpoint" for record in found[begun[-1]:]
            ):
                return
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    hosts = [begin(0), begin(1)]
    try:
        wait_for(2)
        os.killpg(hosts[1].pid, signal.SIGKILL)
        hosts[1].communicate()
        wait_for(1)
        hosts[1] = begin(1)
        wait_for(2)
        for host in hosts:
            host.terminate()
        told = [host.communicate(timeout=60) for host in hosts]
        assert hosts[0].returncode == STOPPED, told
    finally:
        for host in hosts:
            if host.poll() is None:
                os.killpg(host.pid, signal.SIGKILL)
    steps = [record["step"] for record in records() if record["event"] in ("start", "resume", "stopped")]
    assert steps == sorted(steps) and steps[-1] > steps[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("processes, whole", [(4, []), (2, ["whole"])])
def test_replicas_equal_one_network_on_gpus(torchrun, processes, whole):
    """Each on a GPU of its own, or several on one."""
    words = [*COMPARISON[:6], "cuda", *whole]
    check(torchrun(processes, "compare_towers.py", *words).stdout, processes)


def test_masks_are_the_whole_batchs():
    """Of any number of replicas, with batches of less than a block of images, more, and no multiple."""
    for images, parts in ((12, 3), (128, 4), (384, 2), (400, 4)):
        whole = Dropout(0.5, 10, 0, "fc6", None)
        expected = whole.draw(torch.empty(images, 10), 7)
        found = []
        for part in range(parts):
            dropout = Dropout(0.5, 10, 0, "fc6", None)
            dropout.part = part, parts
            found.append(dropout.draw(torch.empty(images // parts, 10), 7))
        assert torch.equal(torch.cat(found), expected)
        assert 0.4 < expected.mean() < 0.6 and not torch.equal(expected[: images // 2], expected[images // 2 :])


@pytest.mark.parametrize("rule, rate, decay", [("none", 1, 1), ("linear", 8, 1), ("sqrt", 8**0.5, 8**0.5)])
def test_rates_of_larger_batches(rule, rate, decay):
    """An epoch's weight decay, rate x decay x steps, stays the same by both rules that change the rate."""
    changed = with_batch(SOURCE, 1024, rule)
    assert changed.batch == 1024 and changed.learning_rate == pytest.approx(rate * SOURCE.learning_rate)
    assert changed.weight_decay == pytest.approx(decay * SOURCE.weight_decay)
    assert changed.bias_rate == pytest.approx(rate * SOURCE.bias_rate)
    assert changed.schedule.conv1_rate == pytest.approx(rate * SOURCE.schedule.conv1_rate)
    if rule != "none":
        epoch = [recipe.learning_rate * recipe.weight_decay / recipe.batch for recipe in (SOURCE, changed)]
        assert epoch[0] == pytest.approx(epoch[1])
    assert with_batch(NOTES, 128, rule) == NOTES


def test_a_warm_up_rises_from_the_recipes_rate_to_the_rules():
    recipe = with_batch(NOTES, 1024, "linear", warmup_epochs=5)
    optimizer = optimizer_of(build(TINY, 7, 0), recipe)
    steps = 100  # an epoch
    rates = [set_rates(optimizer, recipe, Moment(step, 90 * steps, step // steps, Progress()))
             for step in range(0, 6 * steps, 50)]
    assert rates[0] == pytest.approx(NOTES.learning_rate) and rates[-1] == rates[-2] == pytest.approx(0.08)
    rises = [after - before for before, after in zip(rates[:10], rates[1:11])]
    assert rises == pytest.approx([0.007] * 10)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.08] * 4)


def test_nothing_to_warm_up_to():
    with pytest.raises(RecipeError, match="nothing to warm up to"):
        with_batch(NOTES, 1024, "none", 5)


@pytest.mark.parametrize("words, told", [
    (["--rate-rule", "linear"], "--rate-rule and --warmup-epochs go with --batch"),
    (["--batch", "1024", "--warmup-epochs", "2"], "nothing to warm up to"),
    (["--batch", "0"], "--batch"),
])  # fmt: skip
def test_batches_that_cannot_be(tmp_path, words, told):
    done = CliRunner().invoke(cli, ["train", str(tmp_path), str(tmp_path / "run"), *words])
    assert done.exit_code == 2 and told in done.output + str(done.exception), done.output
