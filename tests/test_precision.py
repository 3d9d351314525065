"""Mixed precision, on the CPU, and loss scaling."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from launch.errors import UserError
from launch.precision import choose_precision
from model.exchange.local import local_pair
from model.optimizer import optimizer_of
from model.recipe import TINY
from model.tower import build
from model.training import LossScale, TrainingStep

PIXELS = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 5


def trained(mixed: torch.dtype | None, steps: int = 1):
    network = build(replace(TINY, dropout=0.0), 5, seed=3)
    network.mixed = mixed
    step = TrainingStep(network, optimizer_of(network, replace(TINY, learning_rate=0.001)))
    if step.loss_scale:
        step.loss_scale.scale = 1024.0
    losses = [float(step(PIXELS, LABELS, number)[0]) for number in range(steps)]
    return step, losses


@pytest.mark.parametrize("mixed", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns_as_single_precision_does(mixed):
    losses, rounded_losses = trained(None, 4)[1], trained(mixed, 4)[1]
    assert losses[-1] < losses[0]
    assert rounded_losses == pytest.approx(losses, rel=0.03) and rounded_losses != losses
    exact, rounded = trained(None)[0], trained(mixed)[0]
    kept = [tensor for p in rounded.network.parameters()
            for tensor in (p, p.grad, rounded.optimizer.state[p]["velocity"])]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    for (name, p), q in zip(exact.network.named_parameters(), rounded.network.parameters()):
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.95, name
    assert rounded.network(PIXELS).dtype == torch.float32


def test_an_overflow_halves_the_scale_and_leaves_the_step_out():
    step, _ = trained(torch.float16)
    step.loss_scale.scale = 2.0**40
    before = [p.detach().clone() for p in step.network.parameters()]
    step(PIXELS, LABELS, 1)
    assert all(map(torch.equal, before, step.network.parameters())) and step.loss_scale.scale == 2.0**39
    step.loss_scale.scale = 1024.0
    step(PIXELS, LABELS, 2)
    assert not any(map(torch.equal, before, step.network.parameters())) and step.loss_scale.scale == 1024.0


def test_the_scale_grows_after_good_steps_only():
    scale = LossScale(scale=8.0, patience=2)
    assert scale.unscale([torch.tensor([16.0])], None) and scale.scale == 8
    assert not scale.unscale([torch.tensor([float("inf")])], None) and scale.scale == 4
    gradient = torch.tensor([16.0])
    assert scale.unscale([gradient], None) and float(gradient) == 4 and scale.scale == 4
    assert scale.unscale([gradient], None) and scale.scale == 8


def test_two_towers_leave_out_the_same_step():
    scales = LossScale(), LossScale()
    with ThreadPoolExecutor(2) as pool:
        gradients = [torch.ones(3)], [torch.tensor([float("nan")])]
        done = list(pool.map(LossScale.unscale, scales, gradients, local_pair()))
    assert done == [False, False] and scales[0].scale == scales[1].scale == 32768


def test_precisions_that_a_cpu_has():
    cpu = torch.device("cpu")
    assert choose_precision(None, cpu) == "fp32" and choose_precision("bf16", cpu) == "bf16"
    for name in ("tf32", "fp16"):
        with pytest.raises(UserError, match=f"--precision {name} is of GPUs"):
            choose_precision(name, cpu)
