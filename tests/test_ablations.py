"""Each change to a recipe: what the network or its training is then, against plain torch.nn, whole and in halves."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.ablations import ABLATIONS, ablated
from model.errors import RecipeError
from model.exchange.local import local_pair
from model.recipe import NOTES, SOURCE, TINY, Recipe
from model.tower import build, whole_shapes

PARAMETERS = {  # of notes with 1,000 classes: the towers' convolutions, then 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    "no-links": 60_965_224 - 384 * 128 * 9, "no-conv3": 60_965_224 - 885_120 + 384 * (128 - 192) * 9 + 384 * 128 * 9,
    "no-conv4": 60_965_224 - 663_936, "no-conv5": 60_965_224 - 442_624 + 4096 * 36 * (384 - 256),
    "one-tower": 48 * 364 + 128 * 1201 + 192 * 1153 + 192 * 1729 + 256 * 1729 + 37_752_832 + 16_781_312 + 4_097_000,
}


def plain(recipe: Recipe, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What torch.nn.functional makes of the network's weights; the towers apart, where there are two."""
    activate = torch.tanh if recipe.activation == "tanh" else F.relu

    def conv(name, x, padding, stride=1):
        layer = getattr(network, name)
        parts = x.chunk(2, 1) if layer.weight.shape[1] < x.shape[1] else (x,)
        weights, biases = layer.weight.chunk(len(parts)), layer.bias.chunk(len(parts))
        return activate(torch.cat([F.conv2d(*those, stride, padding) for those in zip(parts, weights, biases)], 1))

    def pool(x):
        return F.max_pool2d(x, recipe.pool_size, 2)

    def norm(x):
        if recipe.lrn_n == 0:
            return x
        parts = x.chunk(1 if recipe.lrn_across_towers else recipe.towers, 1)
        return torch.cat([F.local_response_norm(part, 5, 5e-4, 0.75, 2.0) for part in parts], 1)

    x = pool(norm(conv("conv1", F.pad(images, (0, 3, 0, 3)), 0, 4)))
    x = pool(norm(conv("conv2", x, 2)))
    for name in ("conv3", "conv4", "conv5"):
        if hasattr(network, name):
            x = conv(name, x, 1)
    x = pool(x).flatten(1)
    for layer in (network.fc6, network.fc7):
        x = activate(F.linear(x, layer.weight, layer.bias)) * (1 - recipe.dropout)
    return F.linear(x, network.fc8.weight, network.fc8.bias)


def in_two_towers(recipe: Recipe, images: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, list]:
    """The logits of both towers, and the gradients of (logits * weights).sum(), by parameter and tower."""
    towers = [build(recipe, 10, 0, exchange).double().eval() for exchange in local_pair()]
    logits = [None, None]

    def run(t):
        logits[t] = towers[t](images)
        (logits[t] * weights.chunk(2, 1)[t]).sum().backward()

    threads = [threading.Thread(target=run, args=(t,)) for t in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return torch.cat(logits, 1), [(name, torch.cat([dict(tower.named_parameters())[name].grad for tower in towers]))
                                  for name, _ in towers[0].named_parameters()]


@pytest.mark.parametrize("name", [*ABLATIONS, "joined-lrn"])
def test_changed_networks_are_plain_ones_and_two_towers(name):
    recipe = replace(TINY, lrn_across_towers=True) if name == "joined-lrn" else ablated(TINY, name)
    random = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64, generator=random) * 3
    weights = torch.randn(2, 10, dtype=torch.float64, generator=random)
    network = build(recipe, 10, seed=0).double().eval()
    logits = network(images)
    torch.testing.assert_close(logits, plain(recipe, network, images), rtol=1e-10, atol=1e-12)
    base = build(TINY, 10, seed=0).double().eval()(images)
    if name in ("no-crops", "no-colour"):  # changes to the data
        torch.testing.assert_close(logits, base, rtol=0, atol=0)
    else:
        assert (logits - base).abs().max() > 1e-6
    if recipe.towers == 1:
        return
    (logits * weights).sum().backward()
    of_towers, gradients = in_two_towers(recipe, images, weights)
    torch.testing.assert_close(of_towers, logits, rtol=1e-10, atol=1e-12)
    assert [layer for layer, _ in gradients] == [layer for layer, _ in network.named_parameters()]
    for layer, gradient in gradients:
        torch.testing.assert_close(gradient, network.get_parameter(layer).grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ABLATIONS)
def test_sizes(name):
    shapes = whole_shapes(ablated(NOTES, name), 1000)
    assert sum(shape.numel() for shape in shapes.values()) == PARAMETERS.get(name, 60_965_224)


@pytest.mark.parametrize("base", [NOTES, SOURCE, TINY], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", ABLATIONS)
def test_only_what_is_named_changes(base, name):
    recipe = ablated(base, name)
    differing = {key for key, value in base.to_dict().items() if recipe.to_dict()[key] != value} - {"name"}
    expected = {
        "no-lrn": {"lrn_n", "map_norm"}, "plain-pooling": {"pool_size"}, "one-tower": {"towers", "joined", "kernels"},
        "no-links": {"joined"}, "no-dropout": {"dropout"}, "no-crops": {"crops_and_flips"},
        "no-colour": {"colour_epochs"}, "tanh": {"activation"}, "no-conv3": {"left_out", "joined"},
        "no-conv4": {"left_out"}, "no-conv5": {"left_out"},
    }[name]  # fmt: skip
    assert differing == (expected - {"map_norm"} if base.map_norm is None else expected)
    assert recipe.name == f"{base.name} {name}" and Recipe.from_dict(recipe.to_dict()) == recipe
    assert base.kernels[:4] == tuple(2 * n for n in recipe.kernels[:4]) or name != "one-tower"


def test_unknown_ablations_are_told():
    with pytest.raises(RecipeError, match="no ablation named 'no-relu'; there are no-lrn, plain-pooling, one-tower"):
        ablated(NOTES, "no-relu")
