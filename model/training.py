"""One step of training, the same for the whole network and for a tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from model.captured import CapturedPasses
from model.compiled import gpu_kernels
from model.exchange import Exchange
from model.layers import Linear
from model.network import AlexNet
from model.optimizer import MomentumSGD
from model.softmax import cross_entropy


class TrainingStep:
    """`step(pixels, labels, number)` moves the weights once and returns the loss and how many labels came first.

    pixels float32 [N, 3, 224, 224], labels int64 [N]; `number` is the step's, from which dropout is drawn. Where the
    network's factors are float16 (`network.mixed`) the loss is scaled, for small gradients would be zero there. With
    `graphs`, on a GPU, both passes are replayed from CUDA graphs, after a few steps that are not.

    `averaged` stands for the network where it has replicas, with an equal part of every batch each: it has their
    gradients averaged during the backward pass. The loss is then that of this process's images. Without graphs
    (ValueError).
    """

    def __init__(self, network: AlexNet, optimizer: MomentumSGD, first_class: int = 0,
                 exchange: Exchange | None = None, graphs: bool = False, averaged: nn.Module | None = None):
        if graphs and averaged is not None:
            raise ValueError("no CUDA graphs of replicas")
        self.network, self.optimizer, self.first_class, self.exchange = network, optimizer, first_class, exchange
        self._forward = averaged or network
        device = next(network.parameters()).device
        self.loss_scale = LossScale(device) if network.mixed == torch.float16 else None
        self._captured = CapturedPasses(network, optimizer.join, exchange) if graphs else None
        self._to_round: list[Linear] = []
        # (Of replicas the gradients have to be averaged before the update, which would be made beside that.)
        if device.type == "cuda" and network.mixed == torch.bfloat16 and gpu_kernels() and averaged is None:
            self._to_round = [layer for layer in network.modules() if isinstance(layer, Linear)]

    def __call__(self, pixels: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        self.network.train()
        while self._to_round:  # not before the first step, for until then a checkpoint may be loaded
            layer = self._to_round.pop()
            layer.rounded = self.optimizer.round(layer.weight, self.network.mixed)
        self.optimizer.prepare()
        if self._captured is None:
            loss, right = self._both_passes(pixels, labels, number)
        else:
            loss, right = self._captured(self._both_passes, pixels, labels, number)
        if self.loss_scale is None:
            self.optimizer.step()
        else:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            if self.loss_scale.unscale(gradients, self.exchange):
                self.optimizer.step()
        return loss, right

    def _both_passes(self, pixels: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        with record_function("forward"):
            loss, right = cross_entropy(self._forward(pixels, number), labels, self.first_class, self.exchange)
        with record_function("backward"):
            (loss if self.loss_scale is None else loss * self.loss_scale.factor).backward()
        self.optimizer.join()
        return loss.detach(), right


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): halved after an overflow, whose step is left out,
    doubled after `patience` steps without. Two towers skip the same steps."""

    def __init__(self, device: torch.device | str = "cpu", scale: float = 65536.0, patience: int = 2000):
        self.factor = torch.tensor(scale, device=device)  # in one place: a CUDA graph multiplies by it
        self.patience, self.good_steps = patience, 0
        self.scale = scale

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = scale
        self.factor.fill_(scale)

    def unscale(self, gradients: list[Tensor], exchange: Exchange | None) -> bool:
        """Divide gradients by the scale, in place; return whether all of them, the peer's too, are finite."""
        torch._foreach_mul_(gradients, 1 / self.scale)
        finite = torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all()
        if exchange is not None:
            finite = finite & exchange.swap(finite, "finite gradients")
        if not finite:
            self.scale, self.good_steps = self.scale / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps == self.patience:
            self.scale, self.good_steps = self.scale * 2, 0
        return True
