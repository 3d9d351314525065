"""What the processes of a run must agree on, and where they are."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from launch.errors import UserError
from launch.trainer import checksums
from launch.choice import device_named, graphs_by_default
from launch.world import World, join_world
from model.errors import PeerError
from model.recipe import NOTES


def agree(facts0: dict, facts1: dict) -> list[str | None]:
    """Return what each of two towers is told."""
    store, told = dist.HashStore(), [None, None]

    def tower(rank: int, facts: dict) -> None:
        try:
            World(rank, 2, torch.device("cpu"), 1, 5, "rpc", store).agree(facts)
        except UserError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=tower, args=item) for item in enumerate((facts0, facts1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


FACTS = {"recipe": NOTES.to_dict(), "seed": 0, "data": "ab12", "code": "cd34"}


def test_equal_facts_pass():
    assert agree(FACTS, dict(FACTS)) == [None, None]


@pytest.mark.parametrize("changed, named", [
    ({"seed": 1}, "seed (0 in process 0, 1 in process 1)"),
    ({"data": "ffff"}, 'data ("ab12" in process 0, "ffff" in process 1)'),
    ({"code": "ffff"}, 'code ("cd34" in process 0, "ffff" in process 1)'),
    ({"recipe": {**NOTES.to_dict(), "learning_rate": 0.1}},
     "recipe.learning_rate (0.01 in process 0, 0.1 in process 1)"),
])  # fmt: skip
def test_a_difference_is_named_alone(changed, named):
    told = agree(FACTS, {**FACTS, **changed})
    assert told[0] == f"the processes were started differently: {named}"
    assert told[1]


def test_a_tower_that_never_speaks_is_not_waited_for_for_ever():
    world = World(0, 2, torch.device("cpu"), 1, 0.2, "rpc", dist.HashStore())
    with pytest.raises(PeerError, match="another process died, or did not speak within 0:00:00.2"):
        world.agree(FACTS)


def test_checksums_see_every_label_every_pixel_and_the_order():
    pixels = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    labels = torch.tensor([3, 1, 4, 1])
    reference = checksums(pixels, labels)
    assert checksums(pixels.clone(), labels.clone()) == reference
    assert checksums(pixels.flip(0), labels)[1] != reference[1]
    assert checksums(pixels, labels.flip(0))[0] != reference[0]
    one_bit = pixels.clone()
    one_bit.view(torch.int32)[2, 1, 3, 5] ^= 1
    assert checksums(one_bit, labels)[1] != reference[1]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "cuda:", "cuda:99"])
def test_devices_that_are_none(name):
    with pytest.raises(UserError, match=f"--device {name}: "):
        device_named(name)


def test_two_processes_without_torchrun(monkeypatch):
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are not set"), join_world("cpu", "rpc", 5, 1):
        pass


@pytest.mark.parametrize("variable, value", [
    ("WORLD_SIZE", "x"), ("WORLD_SIZE", ""), ("RANK", "1"), ("RANK", "-1"), ("LOCAL_WORLD_SIZE", "0"),
])  # fmt: skip
def test_nonsense_in_the_environment(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"the environment's {variable} is "), join_world("cpu", "rpc", 5, None):
        pass


@pytest.mark.parametrize("device, transport, processes, expected", [
    ("cpu", "rpc", 1, False), ("cpu", "rpc", 2, False), ("cuda", "rpc", 1, True), ("cuda", "cuda-ipc", 2, True),
    ("cuda", "rpc", 2, False), ("cuda", "rpc-staged", 2, False), ("cuda", "nccl", 2, False),
])  # fmt: skip
def test_where_steps_are_graphs(device, transport, processes, expected):
    assert graphs_by_default(torch.device(device), transport, processes) == expected
