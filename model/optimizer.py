"""The paper's update rule."""

from __future__ import annotations

import torch


class MomentumSGD(torch.optim.Optimizer):
    """v <- momentum v - weight_decay lr w - lr g ; w <- w + v (Krizhevsky et al. 2012, section 5).

    Unlike torch.optim.SGD, whose velocity is in units of the gradient, this velocity carries the
    learning rate it was made with: after a change of rate the two differ. Every parameter decays.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.9, weight_decay: float = 0.0005):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["velocity"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            velocities = [self.state[p]["velocity"] for p in parameters]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, parameters, alpha=-group["weight_decay"] * group["lr"])
            torch._foreach_add_(velocities, [p.grad for p in parameters], alpha=-group["lr"])
            torch._foreach_add_(parameters, velocities)
