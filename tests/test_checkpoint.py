"""Checkpoints are of the whole network: what two processes write one reads, and the other way round."""

from __future__ import annotations

import os
from concurrent.futures import Future

import pytest
import torch

from launch import checkpoint
from launch.checkpoint_writer import CheckpointWriter, save
from launch.errors import UserError
from model.errors import PeerError
from model.recipe import NOTES, TINY
from model.tower import build, whole_shapes

SHAPES = whole_shapes(TINY, 7)  # an odd number of classes: tower 0 holds 4 of them, tower 1 three


def network(seed: int) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in build(TINY, 7, seed).named_parameters()}


def test_two_processes_save_and_one_loads(torchrun, tmp_path):
    torchrun(2, "odd_checkpoint.py", "save", tmp_path)
    found, expected = network(seed=0), network(seed=1)
    checkpoint.load(tmp_path / "step-000000005", found, SHAPES)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_one_process_saves_and_two_load(torchrun, tmp_path):
    save(tmp_path, 5, network(seed=1), SHAPES, {})
    torchrun(2, "odd_checkpoint.py", "load", tmp_path)


def test_another_network_is_refused(tmp_path):
    path = save(tmp_path, 5, network(seed=1), SHAPES, {})
    with pytest.raises(UserError, match=r"does not fit this network .conv1.weight: \[96, 3, 11, 11\] wanted, \[24, 3"):
        checkpoint.load(path, dict(network(seed=0)), whole_shapes(NOTES, 7))


def test_what_is_no_file_of_a_checkpoint_is_not_waited_for(tmp_path):
    path = save(tmp_path, 5, network(seed=1), SHAPES, {})
    (tensors,) = path.glob("*.safetensors")
    for make in (os.mkfifo, lambda place: place.symlink_to("/dev/zero")):
        tensors.unlink()
        make(tensors)
        with pytest.raises(checkpoint.Damaged, match="safetensors: cannot be read .not a plain file"):
            checkpoint.check(path)
    (tmp_path / "step-\N{ARABIC-INDIC DIGIT THREE}").mkdir()
    assert checkpoint.steps(tmp_path) == [path]


@pytest.mark.parametrize("standings", [[2], [0, 2]])
def test_what_breaks_off_elsewhere_is_not_waited_for(tmp_path, standings):
    """DCP would wait an hour for a process that it has not heard fail."""
    others = iter(standings)
    writer = CheckpointWriter(tmp_path, SHAPES, 1, mesh=object(), gather=lambda mine: [mine, [next(others)]])
    writer._writing, writer._ended = Future(), []
    with pytest.raises(PeerError, match="another process broke off"):
        writer.finish()
    assert next(others, None) is None


def test_what_broke_off_here_is_told(tmp_path):
    """And to the others that it did."""
    said = []
    writer = CheckpointWriter(tmp_path, SHAPES, 1, mesh=object(), gather=lambda mine: said.append(mine) or [mine, [0]])
    writer._writing, writer._ended = Future(), [0.0]
    writer._writing.set_exception(ArithmeticError("a mistake of ours"))
    assert writer.has_failed()
    with pytest.raises(ArithmeticError, match="a mistake of ours"):
        writer.finish()
    assert said == [[2]]


def test_an_unfinished_checkpoint_is_never_found_and_cleared_away(tmp_path):
    (tmp_path / "step-000000004.tmp").mkdir()
    assert checkpoint.steps(tmp_path) == []
    save(tmp_path, 5, network(seed=1), SHAPES, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000005"]
