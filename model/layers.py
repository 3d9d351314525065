"""What AlexNet has and torch.nn has not quite: its dropout, the normalisation within a map, and products at full
speed on every CPU.

Shapes: N images, C channels, H x W places, F neurons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.random import generator


class MapNorm(nn.Module):
    """y = x / (k + alpha * sum of x^2 over the n x n places around it, in the same map)^beta, on [N, C, H, W].

    Of Krizhevsky's own configuration, not of the paper. Places beyond the edge count as zeros.
    """

    def __init__(self, k: float, n: int, alpha: float, beta: float):
        super().__init__()
        self.k, self.n, self.alpha, self.beta = k, n, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        # Padded before, not by avg_pool2d: in channels_last on a GPU its gradient is then wrong (pytorch issue 188344).
        squares = F.pad(x * x, (self.n // 2,) * 4)
        mean = F.avg_pool2d(squares, self.n, stride=1)  # of n x n places, those beyond the edge too
        return x * (self.k + self.alpha * self.n**2 * mean).pow(-self.beta)


class Dropout(nn.Module):
    """Section 4.2: in training each output is kept with chance 1 - p; at test all are times 1 - p.

    The mask is drawn for both towers' neurons from (seed, layer, step, block of images) and each tower takes its
    part, so that two towers drop what the whole network drops, replicas what one would, and a resumed run what it would
    have. `part` (i, n) says that x is the i-th of n equal parts of a step's batch.
    """

    BLOCK = 128  # images; a replica draws the blocks that it has images of, not the whole batch of hundreds of GPUs

    def __init__(self, p: float, neurons: int, seed: int, layer: str, tower: int | None):
        super().__init__()
        self.p, self.neurons, self.seed, self.layer, self.tower = p, neurons, seed, layer, tower
        self.part = 0, 1
        self.drawn: Tensor | None = None  # where the mask was drawn before the step (model.captured)

    def forward(self, x: Tensor, step: int) -> Tensor:
        """x [N, F] -> [N, F]; F is `neurons`, or the tower's half of them."""
        if self.p == 0:
            return x
        if not self.training:
            return x * (1 - self.p)
        kept = self.drawn
        if kept is None:
            kept = self.draw(torch.empty(len(x), self.neurons, device=x.device), step)
        if self.tower is not None:
            kept = kept.chunk(2, dim=1)[self.tower]
        return x * kept.to(x.dtype)

    def draw(self, kept: Tensor, step: int) -> Tensor:
        """Fill `kept` [N, neurons] with the mask of a step, 1 for what is kept, and return it."""
        part, parts = self.part
        images = len(kept)
        first, last, all_images = part * images, (part + 1) * images, parts * images
        for start in range(first - first % self.BLOCK, last, self.BLOCK):
            stop = min(start + self.BLOCK, all_images)
            own = kept[max(start - first, 0) : stop - first]
            block = own if len(own) == stop - start else kept.new_empty(stop - start, self.neurons)
            key = self.seed, "dropout", self.layer, step, start
            block.bernoulli_(1 - self.p, generator=generator(kept.device, *key))
            if block is not own:
                own.copy_(block[max(first - start, 0) :][: len(own)])
        return kept


class Linear(nn.Linear):
    """y = x W' + b, x [N, F]. With `rounded`, a copy of the weight in half precision, training multiplies by that."""

    rounded: Tensor | None = None

    @property
    def factor(self) -> Tensor:
        """The weight, or what stands for it."""
        return self.weight if self.rounded is None or not self.training else self.rounded

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.factor, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W' + b for x [N, F], weight [K, F], bias [K]."""
    if _onednn_takes(x, weight):
        return _OneDnnLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same, without gradients; any strides.

    In single precision on the CPU by oneDNN, as torch's convolutions and bfloat16 products are: on AMD's processors
    twice as fast as MKL, which torch has for this.
    """
    if _onednn_takes(x, weight):
        return _onednn_linear()(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _onednn_takes(x: Tensor, weight: Tensor) -> bool:
    return bool(x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel()
                and _onednn_linear() and not torch.is_autocast_enabled("cpu"))


@functools.cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    """Return the operator that torch.compile uses too; None where this torch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()  # of other strides oneDNN takes a hundred times as long
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return (product(grad, weight.t()) if ctx.needs_input_grad[0] else None,
                product(grad.t(), x.t()) if ctx.needs_input_grad[1] else None,
                grad.sum(0) if ctx.needs_input_grad[2] else None)
