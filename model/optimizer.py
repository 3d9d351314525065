"""The paper's update rule, and which parameter learns how fast."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from model.compiled import gpu_kernels
from model.recipe import Recipe
from model.schedule import ByHand, Moment


def optimizer_of(network: nn.Module, recipe: Recipe) -> MomentumSGD:
    """Return an optimizer for `network`, the whole or a tower. A group holds the weights or the biases of conv1, or of
    all other layers: recipes give them rates of their own."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        layer, kind = name.split(".")
        groups.setdefault((layer == "conv1", kind == "bias"), []).append(parameter)
    return MomentumSGD([
        {"params": parameters, "conv1": conv1, "bias": bias,
         "weight_decay": recipe.bias_decay if bias else recipe.weight_decay}
        for (conv1, bias), parameters in groups.items()
    ], recipe.learning_rate, recipe.momentum, recipe.weight_decay)


def set_rates(optimizer: MomentumSGD, recipe: Recipe, moment: Moment) -> float:
    """Give every group of `optimizer_of` its rate at `moment`; return the weights'."""
    schedule = recipe.schedule
    weights = schedule.rate(recipe.learning_rate, moment)
    warming = recipe.warmup_epochs * moment.total_steps / recipe.epochs  # steps
    warmth = recipe.warmup_from + (1 - recipe.warmup_from) * moment.step / warming if moment.step < warming else 1.0
    for group in optimizer.param_groups:
        rate = recipe.bias_rate if group["bias"] and recipe.bias_rate is not None else weights
        if isinstance(schedule, ByHand) and group["conv1"]:
            if moment.epoch >= schedule.conv1_freezes:
                rate = 0.0
            elif moment.epoch >= schedule.conv1_slows and not group["bias"]:
                rate = schedule.conv1_rate
        group["lr"] = rate * warmth
    return weights * warmth


class MomentumSGD(torch.optim.Optimizer):
    """v <- momentum v - weight_decay lr w - lr g ; w <- w + v (Krizhevsky et al. 2012, section 5).

    Unlike torch.optim.SGD, whose velocity is in units of the gradient, this velocity carries the
    learning rate it was made with: after a change of rate the two differ. ValueError for parameters that are not
    contiguous, or neither float32 nor float64.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.9, weight_decay: float = 0.0005):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._rounded: list[Tensor] = []
        self._settings: dict[int, Tensor] = {}  # of groups with rounded parameters: momentum, decay x rate, rate
        self._told: dict[int, list[float]] = {}  # what was last written there
        self._beside: torch.cuda.Stream | None = None
        self._updating = False  # there
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype not in (torch.float32, torch.float64) or not parameter.is_contiguous():
                    raise ValueError(f"a parameter of {parameter.dtype}, strides {parameter.stride()}: it must be "
                                     "contiguous, float32 or float64")
                self.state[parameter]["velocity"] = torch.zeros_like(parameter)

    def round(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """Return a copy of `parameter` (on CUDA) in half precision that stands for it in the network from now on.

        Its gradient moves the parameter and writes the copy anew as soon as it is there, beside the rest of the
        backward pass; `prepare` goes before that pass, `join` after it.
        """
        group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
        rounded = parameter.detach().to(dtype).requires_grad_()
        self._rounded.append(rounded)
        if self._beside is None:
            self._beside = torch.cuda.Stream(parameter.device, priority=-1)  # as in model.captured
        if id(group) not in self._settings:
            self._settings[id(group)] = torch.zeros(3, device=parameter.device)

        def update(rounded: Tensor) -> None:
            self._beside.wait_stream(torch.cuda.current_stream(parameter.device))
            self._updating = True
            with torch.cuda.stream(self._beside):
                gpu_kernels().momentum_update(parameter, self.state[parameter]["velocity"], rounded.grad, rounded,
                                              self._settings[id(group)])

        rounded.register_post_accumulate_grad_hook(update)
        return rounded

    def prepare(self) -> None:
        """Tell the GPU the rates of this step."""
        for group in self.param_groups:
            settings = [group["momentum"], group["weight_decay"] * group["lr"], group["lr"]]
            if id(group) in self._settings and self._told.get(id(group)) != settings:
                self._told[id(group)] = settings
                self._settings[id(group)].copy_(torch.tensor(settings).pin_memory(), non_blocking=True)

    def join(self) -> None:
        """Have the current stream wait for the updates that run beside it."""
        if self._updating:
            torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)
            self._updating = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for rounded in self._rounded:
            rounded.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient, in one pass over memory."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                # torch's fused rule is b <- momentum b + (1 - dampening) (g + decay w) ; w <- w - lr b: with these two
                # settings b is our velocity. (1 - (1 + rate) is -rate to 1e-16, far below a weight's rounding.)
                torch._fused_sgd_(
                    parameters, [p.grad.contiguous() for p in parameters],
                    [self.state[p]["velocity"] for p in parameters], weight_decay=group["weight_decay"],
                    momentum=group["momentum"] or sys.float_info.min,  # of 0 torch would have no velocities at all
                    dampening=1 + group["lr"], lr=-1.0, nesterov=False, maximize=False,
                    is_first_step=False)
