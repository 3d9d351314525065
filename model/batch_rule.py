"""Other batches than the recipe's: what becomes of the learning rate (Krizhevsky 2014, One weird trick for
parallelizing convolutional neural networks, on the batch size)."""

from __future__ import annotations

from dataclasses import replace

from model.errors import RecipeError
from model.recipe import Recipe
from model.schedule import ByHand

RULES = ("none", "linear", "sqrt")


def with_batch(recipe: Recipe, batch: int, rule: str = "none", warmup_epochs: float = 0.0) -> Recipe:
    """Return `recipe` with k times its batch, and by `rule` k ("linear") or sqrt(k) ("sqrt") times its rates.

    sqrt(k) keeps the variance of an epoch's steps; weight decay then grows by sqrt(k) too, so that an epoch's decay,
    rate times decay times steps, stays what it was. With k times the rate it does so by itself; in Krizhevsky's
    experiments that worked better. In the first `warmup_epochs` the rate rises linearly from the recipe's (Goyal et al.
    2017, section 2.2). Raises RecipeError for a warm-up without a change of rate.
    """
    k = batch / recipe.batch
    factor = {"none": 1.0, "linear": k, "sqrt": k**0.5}[rule]
    if warmup_epochs and factor <= 1:
        raise RecipeError("the learning rate does not rise, so there is nothing to warm up to: give a larger batch and "
                          "the rule linear or sqrt")
    decay = k**0.5 if rule == "sqrt" else 1.0
    schedule = recipe.schedule
    if isinstance(schedule, ByHand):
        schedule = replace(schedule, conv1_rate=schedule.conv1_rate * factor)
    return replace(
        recipe, batch=batch, learning_rate=recipe.learning_rate * factor,
        bias_rate=None if recipe.bias_rate is None else recipe.bias_rate * factor,
        weight_decay=recipe.weight_decay * decay, bias_decay=recipe.bias_decay * decay, schedule=schedule,
        warmup_epochs=warmup_epochs, warmup_from=1 / factor if warmup_epochs else 1.0)
