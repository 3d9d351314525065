"""Layers against their formulas written out slowly in float64, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model import layers, response_norm
from model.convolutions import ImageConv2d, space_to_depth, without_groups
from model.layers import Dropout, MapNorm, linear
from model.response_norm import CACHE_BLOCK_BYTES, LocalResponseNorm


def slow_response_norm(x, k, n, alpha, beta, towers):
    """Section 3.3, one number at a time: the window stays within the tower's maps."""
    images, channels, height, width = x.shape
    y = torch.empty_like(x)
    for c in range(channels):
        first = c * towers // channels * (channels // towers)
        last = first + channels // towers - 1
        total = torch.zeros(images, height, width, dtype=x.dtype)
        for j in range(max(first, c - n // 2), min(last, c + n // 2) + 1):
            total += x[:, j] ** 2
        y[:, c] = x[:, c] / (k + alpha * total) ** beta
    return y


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("channels, n, beta", [(10, 5, 0.75), (8, 3, 0.5), (4, 5, 0.75), (2, 5, 1.0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_response_norm_is_the_formula(channels, n, beta, towers, memory_format):
    x = (torch.randn(3, channels, 5, 7, dtype=torch.float64) * 50).to(memory_format=memory_format)
    norm = LocalResponseNorm(2.0, n, 1e-4, beta, towers)
    expected = slow_response_norm(x, 2.0, n, 1e-4, beta, towers)
    torch.testing.assert_close(norm(x), expected, rtol=1e-13, atol=0)


def test_map_norm_is_the_formula():
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64) * 50
    expected = torch.empty_like(x)
    for row in range(6):
        for column in range(7):
            near = x[:, :, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
            total = (near**2).sum((2, 3))
            expected[:, :, row, column] = x[:, :, row, column] / (1 + 1e-3 / 25 * total) ** 0.75
    torch.testing.assert_close(MapNorm(1.0, 5, 1e-3 / 25, 0.75)(x), expected, rtol=1e-13, atol=0)


def test_response_norm_equals_torch_with_its_alpha():
    x = torch.randn(2, 12, 4, 4, dtype=torch.float64) * 100
    ours = LocalResponseNorm(2.0, 5, 1e-4, 0.75, towers=1)(x)
    torch.testing.assert_close(ours, torch.nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)(x), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_response_norm_of_nothing(shape, dtype):
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    LocalResponseNorm(2.0, 5, 1e-4, 0.75, 2)(x, relu=True).sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("towers, beta", [(1, 0.75), (2, 0.75), (2, 0.6)])
def test_response_norm_gradient(towers, beta):
    x = (torch.randn(2, 8, 3, 2, dtype=torch.float64) * 3).requires_grad_()
    torch.autograd.gradcheck(LocalResponseNorm(2.0, 5, 0.05, beta, towers), x, rtol=1e-6)


def test_response_norm_is_the_same_in_blocks():
    images = 5 * CACHE_BLOCK_BYTES // (6 * 64 * 64 * 8) + 1  # not a multiple of a block
    x = torch.randn(images, 6, 64, 64, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    norm = LocalResponseNorm(2.0, 5, 0.1, 0.75, towers=2)
    y = norm(x)
    y.square().sum().backward()
    for i in (0, images // 2, images - 1):
        alone = x.detach()[i : i + 1].clone().requires_grad_()
        y_alone = norm(alone)
        y_alone.square().sum().backward()
        torch.testing.assert_close(y[i : i + 1], y_alone, rtol=1e-13, atol=0)
        torch.testing.assert_close(x.grad[i : i + 1], alone.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels, towers, n, size", [
    (96, 2, 5, 55), (48, 1, 5, 55), (10, 2, 5, 7), (7, 1, 5, 5), (6, 2, 3, 9), (2, 2, 5, 4), (1, 1, 5, 3), (8, 1, 1, 5),
    (2050, 2, 5, 3),
])  # fmt: skip
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_response_norm_is_the_formula(channels, towers, n, size, relu, memory_format):
    x = (torch.randn(2, channels, size, size + 2) * 100).to(memory_format=memory_format).requires_grad_()
    exact = x.detach().double().requires_grad_()
    grad = torch.randn(x.shape)
    norm = LocalResponseNorm(2.0, n, 1e-3, 0.75, towers)
    y, expected = norm(x, relu), norm(exact.relu() if relu else exact)
    assert "Fused" in type(y.grad_fn).__name__ and "Fused" not in type(expected.grad_fn).__name__
    y.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2e-5, atol=1e-6)


def test_compiled_response_norm_over_the_range_of_floats():
    x = torch.tensor([1e-20, 1e-3, 1.0, 1e3, 1e9, 1e15]).reshape(6, 1, 1, 1)
    for k in (1e-6, 1.0, 1e6):
        norm = LocalResponseNorm(k, 5, 1e-4, 0.75, 1)
        torch.testing.assert_close(norm(x).double(), norm(x.double()), rtol=2e-6, atol=0)
    assert norm(torch.full((1, 3, 1, 1), float("nan")), relu=True).isnan().all()


def test_compiled_response_norm_is_the_same_on_any_number_of_threads(monkeypatch):
    x, grad = torch.randn(3, 20, 13, 13), torch.randn(3, 20, 13, 13)

    def results(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        own = x.clone().requires_grad_()
        y = LocalResponseNorm(2.0, 5, 0.1, 0.75, 2)(own, relu=True)
        y.backward(grad)
        return y, own.grad

    for threads in (2, 3, 7):
        assert all(map(torch.equal, results(threads), results(1)))
    assert LocalResponseNorm(2.0, 5, 0.1, 0.75, 2)(x[:0]).shape == (0, 20, 13, 13)


@pytest.mark.parametrize("relu", [False, True])
def test_response_normalisation_of_bfloat16_on_the_cpu_is_that_of_float32_rounded(relu):
    norm = LocalResponseNorm(2.0, 5, 1e-4, 0.75, towers=2)
    x = (30 * torch.randn(3, 12, 7, 5)).bfloat16().contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[1, 3, 2, 2], grad = float("nan"), float("inf"), torch.randn_like(x)
    found, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    y, y_exact = norm(found, relu), norm(exact, relu)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, y_exact.bfloat16(), rtol=0, atol=0, equal_nan=True)
    y.backward(grad)
    y_exact.backward(grad.float())
    torch.testing.assert_close(found.grad, exact.grad.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_response_norm_without_numba_is_the_same(monkeypatch):
    x, norm = torch.randn(3, 20, 13, 13) * 30, LocalResponseNorm(2.0, 5, 0.01, 0.75, 2)
    compiled = norm(x, relu=True)
    monkeypatch.setattr(response_norm, "compiled_kernels", lambda: None)
    torch.testing.assert_close(norm(x, relu=True), compiled, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("side, given", [(227, 224), (227, 227), (227, 223), (23, 20)])
def test_a_convolution_in_blocks_is_the_convolution(side, given):
    layer = ImageConv2d(3, 8, 11, 4, side).double()
    images = torch.randn(2, 3, given, given, dtype=torch.float64)
    found, expected = layer.in_blocks(images, layer.bias), layer(images)
    assert found.shape == expected.shape == (2, 8, *[(side - 11) // 4 + 1] * 2)
    assert torch.equal(layer(space_to_depth(images, 4, layer.blocks, images.dtype)), found)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(found)
    torch.testing.assert_close(torch.autograd.grad(found, layer.weight, grad)[0],
                               torch.autograd.grad(expected, layer.weight, grad)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_without_groups_is_the_one_with_them(groups):
    x, weight = torch.randn(2, 16, 6, 5, dtype=torch.float64), torch.randn(8, 16 // groups, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(x, without_groups(weight, groups), padding=1),
                               F.conv2d(x, weight, padding=1, groups=groups), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [slice(None), slice(40, None)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_products(columns, bias):
    x = torch.randn(5, 70 if columns == slice(None) else 30, requires_grad=True)
    whole = torch.randn(33, 70, requires_grad=True)
    b = torch.randn(33, requires_grad=True) if bias else None
    y = linear(x, whole[:, columns], b)
    assert "OneDnn" in type(y.grad_fn).__name__
    grad = torch.randn(5, 33)
    y.backward(grad)
    exact_x, exact_whole = (t.detach().double().requires_grad_() for t in (x, whole))
    expected = exact_x @ exact_whole[:, columns].t() + (b.detach() if bias else 0)
    expected.backward(grad.double())
    for found, exact in ((y, expected), (x.grad, exact_x.grad), (whole.grad, exact_whole.grad)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(b.grad, grad.sum(0))
    assert linear(x[:0], whole[:, columns]).shape == (0, 33)


def test_products_without_onednn_are_the_same(monkeypatch):
    x, weight = torch.randn(5, 70), torch.randn(33, 70)
    before = linear(x, weight)
    monkeypatch.setattr(layers, "_onednn_linear", lambda: None)
    torch.testing.assert_close(linear(x, weight), before, rtol=1e-5, atol=1e-5)


def test_dropout_towers_drop_what_the_whole_drops():
    x = torch.ones(64, 40)
    whole = Dropout(0.5, 40, seed=1, layer="fc6", tower=None)(x, step=7)
    parts = [Dropout(0.5, 40, seed=1, layer="fc6", tower=t)(x[:, :20], step=7) for t in (0, 1)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert set(whole.unique().tolist()) == {0.0, 1.0}  # kept outputs are not scaled up
    assert 0.45 < whole.mean() < 0.55


@pytest.mark.parametrize("other", [{"step": 8}, {"seed": 2}, {"layer": "fc7"}])
def test_dropout_depends_on_each_key(other):
    def mask(seed=1, layer="fc6", step=7):
        return Dropout(0.5, 40, seed, layer, tower=None)(torch.ones(64, 40), step)

    assert torch.equal(mask(), mask())
    assert not torch.equal(mask(), mask(**other))


def test_dropout_in_evaluation_scales_by_the_share_kept():
    layer = Dropout(0.3, 4, seed=0, layer="fc6", tower=None).eval()
    assert torch.equal(layer(torch.full((2, 4), 10.0), step=3), torch.full((2, 4), 10.0) * 0.7)
