"""Replicas, of the pair of towers and of the whole network, on one host and on two: all learn what one network does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from click.testing import CliRunner
from conftest import PROGRAMS, ROOT

from launch.cli import cli
from model.batch_rule import with_batch
from model.errors import RecipeError
from model.layers import Dropout
from model.optimizer import optimizer_of, set_rates
from model.recipe import NOTES, SOURCE, TINY
from model.schedule import Moment, Progress
from model.tower import build

# Recipe, dropout, type, classes, images a step (of all replicas), transport, device; see tests/programs.
COMPARISON = ["tiny", "0.5", "float64", "7", "8", "rpc", "cpu"]


def check(output: str, processes: int) -> None:
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert sorted(record["rank"] for record in records) == list(range(processes)), output
    for record in records:
        assert len(record["loss"]) == 5 and max(record["loss"] + record["gradient"] + record["weight"]) < 1e-12, record


@pytest.mark.parametrize("processes, whole", [(4, []), (6, []), (3, ["whole"])])
def test_replicas_equal_one_network(torchrun, processes, whole):
    batch = ["12"] if processes % 3 == 0 else ["8"]
    words = [*COMPARISON[:4], *batch, *COMPARISON[5:], *whole]
    check(torchrun(processes, "compare_towers.py", *words).stdout, processes)


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


def on_two_hosts(names: list[str], *words: str, timeout_s: float = 150) -> list[subprocess.CompletedProcess]:
    """Run a program under launch.torchrun with two processes on each host."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        environment.pop(variable, None)
    done: list = [None, None]

    def host(number: int) -> None:
        command = ["ip", "netns", "exec", names[number], sys.executable, "-m", "launch.torchrun", "--nnodes=2",
                   "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=test",
                   f"--rdzv-conf=is_host={number == 0}", f"--local-addr=10.77.0.{number + 1}", *words]
        done[number] = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT,
                                      env=environment)

    threads = [threading.Thread(target=host, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one is not None for one in done)
    return done


def test_two_hosts_equal_one_network(two_hosts):
    done = on_two_hosts(two_hosts, str(PROGRAMS / "compare_towers.py"), *COMPARISON)
    assert [one.returncode for one in done] == [0, 0], done
    check(done[0].stdout + done[1].stdout, 4)


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
