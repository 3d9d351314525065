"""What is for a GPU: Triton's kernels, here by its interpreter too, convolutions, and the step as a CUDA graph."""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from launch.precision import choose_precision
from model import convolutions, response_norm
from model.ablations import ABLATIONS, ablated
from model.convolutions import GroupedConv2d, ImageConv2d, bias_relu
from model.optimizer import optimizer_of
from model.recipe import NOTES, RECIPES, TINY
from model.response_norm import LocalResponseNorm
from model.tower import build
from model.training import TrainingStep


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels, run by its interpreter on the CPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _forget_kernels()
    kernels = importlib.import_module("model.gpu_kernels")
    monkeypatch.setattr(response_norm, "gpu_kernels", lambda: kernels)
    yield kernels
    _forget_kernels()


def _forget_kernels() -> None:
    for name in [name for name in sys.modules if name.startswith("model.gpu_kernels")]:
        del sys.modules[name]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels, towers, n, beta, dtype, tolerance", [
    (96, 2, 5, 0.75, torch.float32, 1e-6), (7, 1, 3, 0.6, torch.float32, 1e-6), (6, 2, 1, 0.75, torch.float32, 1e-6),
    (2, 2, 5, 0.75, torch.float32, 1e-6), (48, 1, 5, 0.75, torch.float16, 2e-3),
    (48, 1, 5, 0.75, torch.bfloat16, 2e-2),  # the interpreter rounds to it coarsely
])  # fmt: skip
def test_gpu_kernels_are_the_formula_when_interpreted(interpreted, channels, towers, n, beta, dtype, tolerance, relu):
    x = (torch.randn(2, channels, 5, 7) * 30).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    norm = LocalResponseNorm(2.0, n, 1e-3, beta, towers)
    y = response_norm._FusedResponseNorm.apply(x, response_norm.gpu_kernel(interpreted, norm, relu))
    expected, grad = norm(exact, relu), torch.randn(x.shape).to(dtype)
    y.backward(grad)
    expected.backward(grad.double())
    y, expected = y.detach(), expected.detach()
    assert y.dtype == x.grad.dtype == dtype
    for found, right in ((y, expected), (x.grad, exact.grad)):
        torch.testing.assert_close(found.double(), right, rtol=0, atol=tolerance * float(right.abs().max()))


@pytest.mark.parametrize("channels, towers, n, beta, size, relu, dtype, tolerance", [
    (96, 2, 5, 0.75, (7, 9), True, torch.float32, 2e-6), (10, 2, 5, 0.75, (4, 6), False, torch.float32, 2e-6),
    (7, 1, 3, 0.6, (8, 3), True, torch.float32, 2e-6), (48, 1, 5, 0.75, (5, 5), True, torch.float16, 2e-3),
])  # fmt: skip
def test_gpu_kernels_with_pooling_when_interpreted(
    interpreted, channels, towers, n, beta, size, relu, dtype, tolerance
):
    torch.manual_seed(0)
    x, bias = (torch.randn(2, channels, *size) * 30).to(dtype).requires_grad_(), torch.randn(channels).requires_grad_()
    exact, exact_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    norm = LocalResponseNorm(2.0, n, 1e-3, beta, towers)
    y = response_norm._PooledResponseNorm.apply(x, bias, response_norm.gpu_kernel(interpreted, norm, relu))
    expected = F.max_pool2d(norm(exact + exact_bias[:, None, None], relu), 3, 2)
    assert y.dtype == dtype and y.shape == expected.shape
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    expected.backward(grad.double())
    y, expected = y.detach(), expected.detach()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    # Of two that are equal when rounded the first is the largest: not so in double precision.
    wrong = (x.grad.double() - exact.grad).abs() > tolerance * float(exact.grad.abs().max())
    assert wrong.float().mean() < (1e-3 if dtype == torch.float32 else 2e-2)
    torch.testing.assert_close(bias.grad, x.grad.float().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 96, 5, 7), (3, 7, 20, 10), (1, 130, 24, 24)])
def test_bias_and_relu_on_a_gpu_when_interpreted(interpreted, shape):
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(shape[1], requires_grad=True)
    y = convolutions._BiasRelu.apply(x, bias, interpreted)
    assert torch.equal(y, F.relu(x + bias[:, None, None]))
    grad = torch.randn(shape)
    y.backward(grad)
    assert torch.equal(x.grad, grad * (y > 0))
    torch.testing.assert_close(bias.grad, x.grad.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side, blocks", [(24, 7), (22, 6)])
def test_images_in_blocks_on_a_gpu_when_interpreted(interpreted, side, blocks):
    images = torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    found = torch.empty(2, blocks, blocks, 4, 4, 3)
    interpreted.space_to_depth(images, found, 4)
    assert torch.equal(found.flatten(3).movedim(-1, 1), convolutions.space_to_depth(images, 4, blocks, images.dtype))


def test_update_on_a_gpu_is_the_rule_when_interpreted(interpreted):
    weight, velocity, grad = torch.randn(1500), torch.randn(1500), torch.randn(1500).half()
    rounded = torch.empty(1500, dtype=torch.float16)
    v = 0.9 * velocity.double() - 1e-3 * weight.double() - 0.02 * grad.double()
    w = weight.double() + v
    interpreted.momentum_update(weight, velocity, grad, rounded, torch.tensor([0.9, 1e-3, 0.02]))
    torch.testing.assert_close(velocity.double(), v, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight.double(), w, rtol=1e-6, atol=1e-6)
    assert torch.equal(rounded, weight.half())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2),
                                              (torch.float64, 1e-12)])
@pytest.mark.parametrize("channels, towers, size, relu", [(96, 2, 55, True), (7, 1, 5, False), (48, 1, 27, True)])
def test_response_norm_on_a_gpu_is_the_formula(channels, towers, size, relu, dtype, tolerance):
    x = (torch.randn(3, channels, size, size, device="cuda") * 30).to(dtype).requires_grad_()
    exact = x.detach().double().cpu().requires_grad_()
    norm = LocalResponseNorm(2.0, 5, 1e-3, 0.75, towers)
    y, expected, grad = norm(x, relu), norm(exact, relu), torch.randn_like(x)
    y.backward(grad)
    expected.backward(grad.double().cpu())
    assert ("Fused" in type(y.grad_fn).__name__) == (dtype != torch.float64)
    y, expected = y.detach(), expected.detach()
    for found, right in ((y, expected), (x.grad, exact.grad)):
        torch.testing.assert_close(found.double().cpu(), right, rtol=0, atol=tolerance * float(right.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("channels, towers, size", [(96, 2, 55), (7, 1, 6), (128, 1, 27)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_with_response_norm_on_a_gpu_is_the_two(channels, towers, size, dtype):
    norm, pool = LocalResponseNorm(2.0, 5, 1e-3, 0.75, towers), torch.nn.MaxPool2d(3, 2)
    x, bias = (torch.randn(3, channels, size, size, device="cuda") * 30).to(dtype), torch.randn(channels, device="cuda")
    together, apart = x.requires_grad_(), x.detach().double().requires_grad_()
    y = norm.pooled(together, bias, pool)
    expected = pool(norm(apart + bias[:, None, None], relu=True))
    assert "Pooled" in type(y.grad_fn).__name__
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y.detach().double(), expected.detach(), rtol=0,
                               atol=tolerance * float(expected.detach().max()))
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    wrong = (together.grad - apart.grad).abs() > tolerance * float(apart.grad.abs().max())
    assert wrong.float().mean() < (1e-4 if dtype == torch.float32 else 3e-2)  # where two maxima are nearly equal


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_relu_on_a_gpu_are_torchs(dtype):
    x = torch.randn(4, 384, 13, 13, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(384, device="cuda", requires_grad=True)
    y = bias_relu(x.requires_grad_(), bias)
    exact = F.relu(x.detach().float() + bias.detach()[:, None, None])
    assert y.dtype == dtype and torch.equal(y.detach(), exact.to(dtype))
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(bias.grad, (grad.float() * (y > 0)).sum((0, 2, 3)), rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
def test_images_in_blocks_on_a_gpu_are_the_cpus():
    images = torch.randn(2, 3, 224, 224)
    found = convolutions.space_to_depth(images.cuda(), 4, 57, images.dtype)
    assert torch.equal(found.cpu(), convolutions.space_to_depth(images, 4, 57, images.dtype))
    half = convolutions.space_to_depth(images.cuda().flip(0), 4, 57, torch.bfloat16)
    convolutions.space_to_depth(images.cuda(), 4, 57, torch.bfloat16, half)  # in place of the other images'
    assert torch.equal(half, found.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_on_a_gpu_are_the_cpus(groups):
    layer = GroupedConv2d(8, 16, 5, padding=2, groups=groups).double()
    first, images = ImageConv2d(3, 8, 11, 4, 227).double(), torch.randn(2, 3, 224, 224, dtype=torch.float64)
    expected = layer(first(images))
    torch.testing.assert_close(layer.cuda()(first.cuda()(images.cuda())).cpu(), expected, rtol=1e-10, atol=1e-10)


def trained(captured: bool, mixed: torch.dtype | None, steps: int = 8) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of some steps, each on other images, and how far they moved the weights."""
    recipe = replace(NOTES, learning_rate=0.001)
    network = build(recipe, 10, seed=3)
    network.mixed = mixed
    network = network.cuda()
    start = [p.detach().clone() for p in network.parameters()]
    step = TrainingStep(network, optimizer_of(network, recipe), graphs=captured)
    random = torch.Generator().manual_seed(0)
    losses = []
    for number in range(steps):
        pixels = (torch.randn(16, 3, 224, 224, generator=random) * 30).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (16,), generator=random)
        losses.append(float(step(pixels.cuda(), labels.cuda(), number)[0]))
    return losses, [p.detach() - before for p, before in zip(network.parameters(), start)]


@pytest.mark.gpu
@pytest.mark.parametrize("mixed", [None, torch.bfloat16, torch.float16])
def test_a_captured_step_is_the_step(mixed):
    """Dropout is drawn anew in each replay, as it would be without; atomic additions leave rounding to chance."""
    (losses, moved), (expected, expected_moved) = trained(True, mixed), trained(False, mixed)
    assert losses == pytest.approx(expected, rel=1e-5 if mixed is None else 2e-2)
    for movement, other in zip(moved, expected_moved):
        assert F.cosine_similarity(movement.flatten(), other.flatten(), dim=0) > (0.999 if mixed is None else 0.9)
        assert 0.8 < movement.norm() / other.norm() < 1.25
    assert len(set(losses)) == len(losses)


@pytest.mark.gpu
def test_rounded_weights_follow_the_weights():
    recipe = replace(NOTES, learning_rate=0.001)
    network = build(recipe, 10, seed=3)
    network.mixed = torch.bfloat16
    network = network.cuda()
    step = TrainingStep(network, optimizer_of(network, recipe), graphs=True)
    before = network.fc6.weight.detach().clone()
    for number in range(6):  # the last three are replayed, of which one with another rate
        rate = 0.0 if number == 5 else 0.001
        for group in step.optimizer.param_groups:
            group["lr"] = rate
        velocity = step.optimizer.state[network.fc6.weight]["velocity"].clone()
        last = network.fc6.weight.detach().clone()
        step(torch.randn(8, 3, 224, 224, device="cuda") * 30, torch.arange(8, device="cuda"), number)
        assert torch.equal(network.fc6.rounded, network.fc6.weight.bfloat16())
    torch.testing.assert_close(network.fc6.weight.detach(), last + 0.9 * velocity, rtol=1e-6, atol=1e-8)
    assert network.fc6.weight.dtype == torch.float32 and not torch.equal(network.fc6.weight, before)
    assert network.fc6.factor is network.fc6.rounded and network.eval().fc6.factor is network.fc6.weight


RECIPES_ON_A_GPU = [*RECIPES.values(), *(ablated(TINY, name) for name in ABLATIONS if name != "centre-crop")]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES_ON_A_GPU, ids=lambda recipe: recipe.name)
def test_the_network_on_a_gpu_is_the_cpus_in_double_precision(recipe):
    """Fused kernels and all: logits and every gradient, in single precision.

    As in test_towers: a unit within rounding of zero moves gradients by percents in one batch or another, an error in all.
    """
    choose_precision("fp32", torch.device("cuda"))
    recipe, random = replace(recipe, dropout=0.0), torch.Generator().manual_seed(1)
    network = build(recipe, 10, seed=3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5, generator=random)
    exact, network = copy.deepcopy(network).double(), network.cuda()
    differences = []
    for _ in range(5):
        pixels = torch.randn(4, 3, 224, 224, generator=random) * 60 * recipe.pixel_scale
        labels = torch.arange(4)
        outputs = []
        for one, images in ((network, pixels.cuda()), (exact, pixels.double())):
            one.zero_grad()
            outputs.append(one(images))
            F.cross_entropy(outputs[-1], labels.to(images.device)).backward()
        logits, expected = (output.detach().cpu().double() for output in outputs)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        differences.append(max(float((p.grad.cpu().double() - q.grad).abs().max() / q.grad.abs().max())
                               for p, q in zip(network.parameters(), exact.parameters())))
    assert min(differences) < 1e-4, differences
