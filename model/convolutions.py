"""Convolutions in the forms that are fast where they run, and what follows most: bias and ReLU.

Shapes: N images, C channels, H x W places, K kernels.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.compiled import gpu_kernels_for

INDICES = 2**31  # places that these kernels can tell apart


class ImageConv2d(nn.Conv2d):
    """A convolution over images taken as `side` places wide and high, zeros to the right and below included.

    GPUs multiply many channels fast and three slowly. There, stride x stride places become channels, of images
    ([N, 3, 224, 224] -> [N, 48, 57, 57]) as of kernels ([K, 3, 11, 11] -> [K, 48, 3, 3]): the same sums in a quarter of
    the time.
    """

    def __init__(self, maps: int, kernels: int, size: int, stride: int, side: int):
        super().__init__(maps, kernels, size, stride)
        self.side = side
        self.kernel_blocks = -(-size // stride)
        self.blocks = (side - size) // stride + self.kernel_blocks

    def forward(self, images: Tensor, biased: bool = True) -> Tensor:
        """[N, C, H, W], H and W at most `side`, or what `laid_out` made of them -> [N, K, H', W']."""
        bias = self.bias if biased else None
        if images.is_cuda or images.shape[1] != self.in_channels:
            return self.in_blocks(images, bias)
        missing = self.side - images.shape[-1]
        return F.conv2d(F.pad(images, (0, missing, 0, missing)), self.weight, bias, self.stride)

    def laid_out(self, images: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the blocks that `forward` would make of images on a GPU first, in `dtype`. With `out`, write there."""
        return space_to_depth(images, self.stride[0], self.blocks, dtype, out)

    def in_blocks(self, images: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the same by blocks of stride x stride places."""
        stride, high = self.stride[0], self.kernel_blocks
        if images.shape[1] == self.in_channels:
            autocast = torch.is_autocast_enabled("cuda")
            images = self.laid_out(images, torch.get_autocast_dtype("cuda") if autocast else images.dtype)
        kernels = F.pad(self.weight, (0, high * stride - self.kernel_size[0]) * 2).unflatten(3, (high, stride))
        kernels = kernels.unflatten(2, (high, stride)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        return F.conv2d(images, kernels, bias)


def space_to_depth(images: Tensor, stride: int, blocks: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return [N, stride stride C, blocks, blocks] of [N, C, H, W], zeros where no image is; in channels_last.

    With `out`, what this returned before, write there. Not differentiable: ValueError for images that ask for a
    gradient.
    """
    if images.requires_grad:
        raise ValueError("images in blocks have no gradient")
    shape = len(images), blocks, blocks, stride, stride, images.shape[1]
    kernels = gpu_kernels_for(images) if math.prod(shape) < INDICES else None
    if out is not None:
        found = out.movedim(1, -1).view(shape)
    else:
        found = (images.new_empty if kernels else images.new_zeros)(shape, dtype=dtype)
    if kernels:
        kernels.space_to_depth(images.contiguous(memory_format=torch.channels_last), found, stride)
    else:
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % stride, 0, -height % stride))
        parts = images.movedim(1, -1).unflatten(2, (-1, stride)).unflatten(1, (-1, stride))  # [N, H/s, s, W/s, s, C]
        found[:, :parts.shape[1], :parts.shape[3]].transpose(2, 3).copy_(parts)
    return found.flatten(3).movedim(-1, 1)


class GroupedConv2d(nn.Conv2d):
    """A convolution in groups; on a GPU, whose kernels for groups are slow, as one product with zeros between them."""

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        weight, groups = self.weight, self.groups
        if x.is_cuda and groups > 1:
            weight, groups = without_groups(weight, groups), 1
        return F.conv2d(x, weight, self.bias if biased else None, self.stride, self.padding, groups=groups)


def without_groups(weight: Tensor, groups: int) -> Tensor:
    """Return [K, C, h, w], kernels of a convolution not in groups, of those of one that is, [K, C / groups, h, w]."""
    maps = weight.shape[1]
    return torch.cat([F.pad(kernels, (0, 0, 0, 0, maps * group, maps * (groups - 1 - group)))
                      for group, kernels in enumerate(weight.chunk(groups))])


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """Return max(x + bias, 0), x [N, C, H, W], bias [C]: on a GPU in one pass."""
    if x.numel() < INDICES and (kernels := gpu_kernels_for(x)):
        return _BiasRelu.apply(x, bias, kernels)
    return F.relu(x + bias[:, None, None].to(x.dtype))


class _BiasRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor, kernels: ModuleType) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        kernels.bias_relu(x, bias, y)
        ctx.save_for_backward(y)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (y,) = ctx.saved_tensors
        grad_x = torch.ops.aten.threshold_backward(grad.contiguous(memory_format=torch.channels_last), y, 0)
        return grad_x, ctx.kernels.column_sums(grad_x), None
