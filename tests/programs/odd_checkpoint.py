"""Two towers of a network with 7 classes: save it to FOLDER, or load it from there and compare. save|load FOLDER"""

import sys
from pathlib import Path

import torch

from launch import checkpoint
from launch.checkpoint_writer import CheckpointWriter
from launch.world import join_world
from model.recipe import TINY
from model.tower import build, whole_shapes

act, folder = sys.argv[1], Path(sys.argv[2])
with join_world("cpu", "rpc", timeout_s=60, threads=1) as world:
    world.connect()
    tower = build(TINY, 7, 1, world.exchange)
    tensors = {name: parameter.detach() for name, parameter in tower.named_parameters()}
    if act == "save":
        writer = CheckpointWriter(folder, whole_shapes(TINY, 7), 1, world.mesh, world.writing, world.gather)
        writer.begin(5, tensors, {})
        writer.finish()
    else:
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.fill_(float("nan"))
        checkpoint.load(checkpoint.steps(folder)[-1], tensors, whole_shapes(TINY, 7), world.mesh)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
