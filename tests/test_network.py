"""The whole network against the paper's sizes and against plain torch.nn; its start; the two halves of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from model.exchange.local import local_pair
from model.recipe import LAYERS, NOTES, PAPER, SOURCE, TINY, SameMapNorm
from model.tower import build, whole_shapes

# Krizhevsky et al. 2012, figure 2; kernels and sizes of one tower, doubled.
WEIGHTS = {
    "conv1": (96, 3, 11, 11), "conv2": (256, 48, 5, 5), "conv3": (384, 256, 3, 3), "conv4": (384, 192, 3, 3),
    "conv5": (256, 192, 3, 3), "fc6": (4096, 9216), "fc7": (4096, 4096), "fc8": (1000, 4096),
}  # fmt: skip


def test_sizes_are_the_papers():
    shapes = whole_shapes(NOTES, 1000)
    assert {name: tuple(shapes[f"{name}.weight"]) for name in WEIGHTS} == WEIGHTS
    assert sum(shape.numel() for shape in shapes.values()) == 60_965_224


@pytest.mark.parametrize("classes, halves", [(1000, (30_482_612, 30_482_612)), (7, (None, None))])
def test_towers_are_halves_of_the_whole(classes, halves):
    recipe = NOTES if classes == 1000 else TINY
    whole = build(recipe, classes, seed=3)
    towers = [build(recipe, classes, 3, exchange) for exchange in local_pair()]
    for tower, size in zip(towers, halves):
        assert size is None or sum(p.numel() for p in tower.parameters()) == size
    for (name, parameter), *parts in zip(whole.named_parameters(), *(t.named_parameters() for t in towers)):
        assert [part_name for part_name, _ in parts] == [name, name]
        assert torch.equal(torch.cat([part for _, part in parts]), parameter), name


def plain_network(recipe, classes):
    """What anybody would write with torch.nn, for windows of LRN that stay in a tower: two stacks, joined by hand."""
    k1, k2, k3, k4, k5 = recipe.kernels
    lrn = nn.LocalResponseNorm(recipe.lrn_n, recipe.lrn_alpha * recipe.lrn_n, recipe.lrn_beta, recipe.lrn_k)
    pool, relu = nn.MaxPool2d(3, 2), nn.ReLU()
    bottoms = [nn.Sequential(nn.Conv2d(3, k1 // 2, 11, 4), relu, lrn, pool,
                             nn.Conv2d(k1 // 2, k2 // 2, 5, padding=2), relu, lrn, pool) for _ in (0, 1)]
    middle = nn.Conv2d(k2, k3, 3, padding=1)
    tops = [nn.Sequential(nn.Conv2d(k3 // 2, k4 // 2, 3, padding=1), relu,
                          nn.Conv2d(k4 // 2, k5 // 2, 3, padding=1), relu, pool) for _ in (0, 1)]
    head = [nn.Linear(k5 * 36, recipe.neurons[0]), nn.Linear(*recipe.neurons), nn.Linear(recipe.neurons[1], classes)]
    layers = {"conv1": [b[0] for b in bottoms], "conv2": [b[4] for b in bottoms], "conv3": [middle],
              "conv4": [t[0] for t in tops], "conv5": [t[2] for t in tops],
              "fc6": [head[0]], "fc7": [head[1]], "fc8": [head[2]]}

    def forward(images):
        x = nn.functional.pad(images, (0, 3, 0, 3))
        x = torch.relu(middle(torch.cat([bottom(x) for bottom in bottoms], 1)))
        x = torch.cat([top(half) for top, half in zip(tops, x.chunk(2, 1))], 1).flatten(1)
        x = torch.relu(head[0](x)) * 0.5
        return head[2](torch.relu(head[1](x)) * 0.5)

    return layers, forward


def test_whole_network_equals_a_plain_one():
    network = build(TINY, 10, seed=0).double().eval()
    layers, forward = plain_network(TINY, 10)
    for name, parts in layers.items():
        layer = getattr(network, name)
        for part, weight, bias in zip(parts, layer.weight.chunk(len(parts)), layer.bias.chunk(len(parts))):
            part.double()
            part.weight.data, part.bias.data = weight.detach(), bias.detach()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    torch.testing.assert_close(network(images), forward(images), rtol=1e-12, atol=1e-14)


def test_notes_start():
    network = build(NOTES, 1000, seed=0)
    for name, layer in network.named_children():
        if hasattr(layer, "weight"):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
            assert layer.weight.mean().item() == pytest.approx(0, abs=5e-4)
            expected = 1.0 if name in ("conv2", "conv3", "conv5", "fc6", "fc7", "fc8") else 0.0
            assert torch.all(layer.bias == expected), name


@pytest.mark.parametrize("recipe", [PAPER, SOURCE], ids=lambda recipe: recipe.name)
def test_start_of_the_paper_and_of_its_program(recipe):
    network = build(recipe, 1000, seed=0)
    for name in LAYERS:
        layer = getattr(network, name)
        std = 0.03 if recipe is SOURCE and name in ("conv3", "conv4", "conv5") else 0.01
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert torch.all(layer.bias == float(name in ("conv2", "conv4", "conv5", "fc6", "fc7"))), name


def test_order_and_norms_of_the_authors_program():
    recipe = replace(TINY, lrn_before_relu=True, map_norm=SameMapNorm())
    network = build(recipe, 10, seed=0).double().eval()
    seen = {}
    network.conv2.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    network.conv3.register_forward_hook(lambda module, inputs, output: seen.update(z=inputs[0]))
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64) * 20
    network(images)
    lrn, pool = nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0), nn.MaxPool2d(3, 2)

    def by_tower(x):
        return torch.cat([lrn(half) for half in x.chunk(2, 1)], 1)

    conv1 = network.conv1(nn.functional.pad(images, (0, 3, 0, 3)))
    torch.testing.assert_close(seen["x"], pool(by_tower(conv1)).relu(), rtol=1e-12, atol=0)
    normed = by_tower(seen["y"].relu())
    windows = nn.functional.unfold(normed, 5, padding=2).unflatten(1, (normed.shape[1], 25))
    normed = normed / (1 + 1e-3 / 25 * (windows**2).sum(2).view_as(normed)) ** 0.75
    torch.testing.assert_close(seen["z"], pool(normed), rtol=1e-12, atol=0)


def test_he_start_and_seeds():
    first, again, other = (build(TINY, 10, seed=seed) for seed in (0, 0, 1))
    assert first.fc6.weight.std().item() == pytest.approx((2 / (64 * 36)) ** 0.5, rel=0.02)
    assert torch.equal(first.fc6.weight, again.fc6.weight)
    assert not torch.equal(first.fc6.weight, other.fc6.weight)
    assert not torch.equal(first.fc7.weight[:10, :10], first.fc8.weight[:10, :10])


def test_no_response_crosses_the_towers_before_conv3():
    network = build(replace(TINY, dropout=0.0), 10, seed=0).double()
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    seen = {}
    network.conv3.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    network(images)
    before = seen["x"]
    with torch.no_grad():
        network.conv1.weight[:12] += 1.0  # tower 0's kernels alone
    network(images)
    assert torch.equal(seen["x"][:, 32:], before[:, 32:])
    assert not torch.equal(seen["x"][:, :32], before[:, :32])
