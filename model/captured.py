"""Both passes of a step as one CUDA graph: the GPU is sent one launch in place of some hundred.

For the whole network in one process: towers speak to each other in the midst of their passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.layers import Dropout
from model.network import AlexNet

EAGER_CALLS = 3  # first: libraries choose and load kernels, which a capture must not see
Passes = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class CapturedPasses:
    """`captured(pixels, labels, number)` does what `passes` does, from the fourth call on by replaying it.

    `passes` sets gradients anew and returns the loss and how many labels came first; it reads nothing that moves but
    its arguments. What depends on `number`, the dropout masks, is drawn before a replay.
    """

    def __init__(self, network: AlexNet, passes: Passes):
        self._passes = passes
        self._dropouts = [layer for layer in network.modules() if isinstance(layer, Dropout) and layer.p]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self, pixels: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        self._calls += 1
        if self._calls <= EAGER_CALLS:
            return self._passes(pixels, labels, number)
        if self._graph is None:
            self._capture(pixels, labels, number)
        if pixels.shape != self._pixels.shape:
            raise ValueError(f"a batch of shape {list(pixels.shape)} after those of {list(self._pixels.shape)}")
        self._pixels.copy_(pixels)
        self._labels.copy_(labels)
        for dropout, mask in zip(self._dropouts, self._masks):
            dropout.draw(mask, number)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)

    def _capture(self, pixels: Tensor, labels: Tensor, number: int) -> None:
        self._pixels, self._labels = pixels.clone(), labels.clone()  # in the same memory format
        self._masks = [torch.empty(len(pixels), dropout.neurons, device=pixels.device) for dropout in self._dropouts]
        graph = torch.cuda.CUDAGraph()
        for dropout, mask in zip(self._dropouts, self._masks):
            dropout.drawn = mask
        try:
            # Other threads, DALI's, may go on allocating memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._passes(self._pixels, self._labels, number)
        finally:
            for dropout in self._dropouts:
                dropout.drawn = None
        self._graph = graph
