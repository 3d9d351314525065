"""The update rule, the schedules and the recipes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from model.errors import RecipeError
from model.optimizer import MomentumSGD, optimizer_of, set_rates
from model.recipe import NOTES, PAPER, RECIPES, SOURCE, TINY, Recipe, SameMapNorm, meanings, recipe_named
from model.schedule import Moment, OneCycle, Plateau, Progress
from model.tower import build


def test_update_rule_over_a_change_of_rate():
    """v <- 0.9 v - 0.0005 lr w - lr g ; w <- w + v, with numbers (section 5)."""
    w, v = [1.5, -2.0, 0.25], [0.0, 0.0, 0.0]
    parameter = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    optimizer = MomentumSGD([parameter], lr=0.01, momentum=0.9, weight_decay=0.0005)
    for step, rate in enumerate([0.01, 0.01, 0.001, 0.001, 0.1]):
        gradient = [math.sin(step + i) for i in range(3)]
        for i in range(3):
            v[i] = 0.9 * v[i] - 0.0005 * rate * w[i] - rate * gradient[i]
            w[i] = w[i] + v[i]
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        torch.testing.assert_close(parameter.tolist(), w, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_rule_without_momentum(dtype):
    parameter = torch.tensor([1.5, -2.0], dtype=dtype, requires_grad=True)
    optimizer = MomentumSGD([parameter], lr=0.01, momentum=0.0, weight_decay=0.0005)
    w = [1.5, -2.0]
    for gradient in ([0.5, -4.0], [1.0, 0.0], [0.0, 2.0]):
        w = [weight - 0.01 * (g + 0.0005 * weight) for weight, g in zip(w, gradient)]
        parameter.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
        torch.testing.assert_close(parameter.tolist(), w, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)


@pytest.mark.parametrize("parameter", [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, 4).t(),
                                       torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)])
def test_parameters_that_the_update_does_not_take_are_refused(parameter):
    with pytest.raises(ValueError, match="it must be contiguous, float32 or float64"):
        MomentumSGD([parameter.requires_grad_()], lr=0.01)


def test_update_rule_is_not_torchs_after_a_change_of_rate():
    ours, theirs = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizers = (MomentumSGD([ours], lr=0.01), torch.optim.SGD([theirs], lr=0.01, momentum=0.9, weight_decay=0.0005))
    for rate in (0.01, 0.01):
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)  # the same while the rate is
    for parameter, optimizer in zip((ours, theirs), optimizers):
        optimizer.param_groups[0]["lr"] = 0.001
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert (ours - theirs).abs().item() > 0.01


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_single_precision_follows_the_rule(momentum):
    shapes = (1001, 37), (5,), (8, 3, 11, 11)
    singles = [torch.randn(shape, requires_grad=True) for shape in shapes]
    doubles = [single.detach().double().requires_grad_() for single in singles]
    optimizers = [MomentumSGD(parameters, lr=0.01, momentum=momentum) for parameters in (singles, doubles)]
    for rate in (0.01, 0.01, 0.001, 0.0):
        for single, double in zip(singles, doubles):
            single.grad = torch.randn(single.shape)
            if single.dim() == 4:
                single.grad = single.grad.contiguous(memory_format=torch.channels_last)
            double.grad = single.grad.double()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    for single, double in zip(singles, doubles):
        torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-6)
        velocities = optimizers[0].state[single]["velocity"], optimizers[1].state[double]["velocity"]
        torch.testing.assert_close(velocities[0].double(), velocities[1], rtol=1e-5, atol=1e-8)


def run_plateau(schedule, errors):
    progress, rates = Progress(), []
    for epoch, error in enumerate(errors):
        if schedule.ended(progress):
            return rates, epoch
        rates.append(schedule.rate(0.01, Moment(epoch, 90, epoch, progress)))
        progress = schedule.observe(progress, error)
    return rates, len(rates) if not schedule.ended(progress) else len(errors)


def test_plateau_divides_three_times_then_ends():
    rates, ended_after = run_plateau(Plateau(patience_epochs=2), [0.9, 0.8] + [0.8] * 20)
    assert rates == pytest.approx([0.01] * 4 + [1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)
    assert ended_after == 10


def test_plateau_waits_while_the_error_falls():
    rates, _ = run_plateau(Plateau(patience_epochs=2), [0.9, 0.9, 0.8, 0.85, 0.7, 0.75, 0.6])
    assert rates == [0.01] * 7


def test_one_cycle():
    schedule = OneCycle(warmup=0.25)
    rates = [schedule.rate(0.03, Moment(step, 100, 0, Progress())) for step in range(100)]
    assert rates[0] == pytest.approx(0.03 / 25)
    assert max(rates) == rates[24] == pytest.approx(0.03)
    assert rates[25] == pytest.approx(0.03)
    assert rates[62] == pytest.approx(0.03 * (1 + math.cos(math.pi * 37 / 75)) / 2)
    assert 0 < rates[-1] < 1e-4
    assert rates[24:] == sorted(rates[24:], reverse=True)


def test_notes_recipe_is_the_notes():
    assert NOTES.kernels == (96, 256, 384, 384, 256) and NOTES.neurons == (4096, 4096)
    assert (NOTES.learning_rate, NOTES.momentum, NOTES.weight_decay, NOTES.batch) == (0.01, 0.9, 0.0005, 128)
    assert (NOTES.lrn_k, NOTES.lrn_n, NOTES.lrn_alpha, NOTES.lrn_beta) == (2.0, 5, 1e-4, 0.75)
    assert (NOTES.dropout, NOTES.colour_std, NOTES.epochs, NOTES.weight_std) == (0.5, 0.1, 90, (0.01,) * 8)
    assert NOTES.ones == ("conv2", "conv3", "conv5", "fc6", "fc7", "fc8")
    assert NOTES.schedule.factor == 10 and NOTES.schedule.drops == 3


def test_the_paper_differs_from_the_notes_in_biases_only():
    assert PAPER.ones == ("conv2", "conv4", "conv5", "fc6", "fc7")
    assert replace(PAPER, name="notes", ones=NOTES.ones) == NOTES


def test_source_is_configuration_145():
    assert SOURCE.weight_std == (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01) and SOURCE.ones == PAPER.ones
    assert (SOURCE.lrn_k, SOURCE.lrn_n, SOURCE.lrn_alpha * 5, SOURCE.lrn_beta) == (2.0, 5, 1e-4, 0.75)
    norm = SOURCE.map_norm
    assert SOURCE.lrn_before_relu and (norm.k, norm.n, norm.alpha * 25, norm.beta) == (1.0, 5, 1e-3, 0.75)
    assert (SOURCE.colour_std, SOURCE.colour_by, SOURCE.colour_shrink, SOURCE.colour_epochs) == (
        0.1, "deviation", 1.1, 68)
    assert (SOURCE.crops_shared_by, SOURCE.mean_at) == (32, "centre")
    assert (SOURCE.learning_rate, SOURCE.bias_rate, SOURCE.weight_decay, SOURCE.bias_decay) == (0.01, 0.02, 0.0005, 0)
    assert (SOURCE.momentum, SOURCE.batch, SOURCE.dropout, SOURCE.epochs) == (0.9, 128, 0.5, 93)
    assert (SOURCE.kernels, SOURCE.neurons, SOURCE.pixel_scale) == (NOTES.kernels, NOTES.neurons, 1.0)


def rates_of(recipe, epoch) -> dict[str, float]:
    network = build(replace(recipe, kernels=TINY.kernels, neurons=(2, 2)), 2, 0)
    optimizer = optimizer_of(network, recipe)
    shown = set_rates(optimizer, recipe, Moment(0, 1, epoch, Progress()))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in network.named_parameters()}
    assert shown == found["fc8.weight"] and len(found) == 16
    return found


@pytest.mark.parametrize(("epoch", "weights", "conv1", "conv1_bias"), [
    (0, 1e-2, 1e-2, 0.02), (22, 1e-2, 1e-2, 0.02), (23, 1e-3, 1e-3, 0.02), (50, 1e-3, 1e-3, 0.02),
    (51, 1e-4, 1e-4, 0.02), (67, 1e-4, 1e-4, 0.02), (68, 1e-4, 1e-5, 0.02), (71, 1e-4, 1e-5, 0.02),
    (72, 1e-4, 0.0, 0.0), (77, 1e-4, 0.0, 0.0), (78, 1e-5, 0.0, 0.0), (92, 1e-5, 0.0, 0.0),
])
def test_rates_of_the_authors_program(epoch, weights, conv1, conv1_bias):
    for name, rate in rates_of(SOURCE, epoch).items():
        expected = {"conv1.weight": conv1, "conv1.bias": conv1_bias}.get(
            name, 0.02 if name.endswith("bias") else weights)
        assert rate == pytest.approx(expected, rel=1e-12), name


def test_all_parameters_of_the_paper_have_one_rate_and_one_decay():
    assert set(rates_of(PAPER, 50).values()) == {0.01}
    for recipe, decay in ((PAPER, {0.0005}), (SOURCE, {0.0005, 0.0})):
        groups = optimizer_of(build(TINY, 2, 0), recipe).param_groups
        assert {group["weight_decay"] for group in groups} == decay
        assert all(group["weight_decay"] == 0.0005 for group in groups if not group["bias"])


def test_every_field_is_explained():
    assert {"name", *meanings()} == set(NOTES.to_dict()) and all(meanings().values())


def test_tiny_is_a_quarter_as_wide():
    assert TINY.kernels == tuple(n // 4 for n in NOTES.kernels)
    assert TINY.neurons == tuple(n // 4 for n in NOTES.neurons)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_recipes_survive_json(recipe):
    stored = json.loads(json.dumps(recipe.to_dict()))
    assert stored == recipe.to_dict()
    assert Recipe.from_dict(stored) == recipe


@pytest.mark.parametrize("wrong", [
    {"kernels": (96, 256, 384, 384)}, {"kernels": (95, 256, 384, 384, 256)}, {"ones": ("conv9",)}, {"lrn_n": 4},
    {"dropout": 1.0}, {"momentum": -0.1}, {"batch": 0}, {"learning_rate": 0.0}, {"lrn_k": 0.0}, {"colour_std": -1.0},
    {"weight_std": (0.01,)}, {"mean_at": "edge"}, {"colour_by": "sum"}, {"crops_shared_by": 0}, {"colour_shrink": 0.0},
    {"towers": 3}, {"activation": "elu"}, {"pool_size": 4}, {"joined": ("conv1",)}, {"left_out": ("conv2",)},
    {"lrn_n": -1}, {"crop": 228}, {"crop": 200},
    {"bias_rate": -0.1}, {"colour_epochs": -1}, {"bias_decay": -1.0}, {"map_norm": SameMapNorm(n=4)},
])  # fmt: skip
def test_recipes_are_checked(wrong):
    with pytest.raises(RecipeError):
        replace(NOTES, **wrong)


def test_unknown_recipes_and_fields_are_told():
    with pytest.raises(RecipeError, match="no recipe named 'big'; there are notes, paper, source, tiny"):
        recipe_named("big")
    with pytest.raises(RecipeError, match="not a recipe of this version"):
        Recipe.from_dict({**NOTES.to_dict(), "colour": 3})
