"""Ablations: one change to a recipe each, and what Krizhevsky, Sutskever and Hinton (2012) say that it costs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from model.errors import RecipeError
from model.recipe import CONVOLUTIONS, Recipe


@dataclass(frozen=True)
class Ablation:
    """A changed network or training. Rises are of error, in percentage points; None where the paper has no number."""

    what: str
    paper_says: str
    paper_top1: float | None = None
    paper_top5: float | None = None
    fields: dict = field(default_factory=dict)

    def of(self, recipe: Recipe) -> Recipe:
        return replace(recipe, **self.fields)


class _OneTower(Ablation):
    """Half the kernels in each convolution but the last, so that there are about as many parameters in all."""

    def of(self, recipe: Recipe) -> Recipe:
        *kernels, last = recipe.kernels
        return replace(recipe, towers=1, joined=(), kernels=(*(n // 2 for n in kernels), last))


class _WithoutConvolution(Ablation):
    """The towers are still joined once: in the layer after, if conv3 is left out."""

    def of(self, recipe: Recipe) -> Recipe:
        (layer,) = self.fields["left_out"]
        after = CONVOLUTIONS[CONVOLUTIONS.index(layer) + 1 :][:1]
        joined = tuple(dict.fromkeys(name for one in recipe.joined for name in (after if one == layer else (one,))))
        return replace(recipe, left_out=(layer,), joined=joined)


_MIDDLE = "removing any of the middle layers costs about 2 % top-1 (section 7)"

ABLATIONS = {
    "no-lrn": Ablation("without response normalisation", "section 3.3", 1.4, 1.2, {"lrn_n": 0, "map_norm": None}),
    "plain-pooling": Ablation("pooling windows of 2, which do not overlap", "section 3.4", 0.4, 0.3, {"pool_size": 2}),
    "one-tower": _OneTower("one tower: half the kernels in conv1 to conv4", "section 3.2", 1.7, 1.2),
    "no-links": Ablation("conv3 reads its own tower only", "no number", fields={"joined": ()}),
    "no-dropout": Ablation("without dropout", "substantial overfitting (section 4.2)", fields={"dropout": 0.0}),
    "no-crops": Ablation("without crops and flips", "substantial overfitting (section 4.1)",
                         fields={"crops_and_flips": False}),
    "no-colour": Ablation("without colour noise", "over 1 % top-1 (section 4.1)", 1.0, fields={"colour_epochs": 0}),
    "tanh": Ablation("tanh in place of ReLU", "six times as long to 25 % training error on CIFAR-10 (section 3.1)",
                     fields={"activation": "tanh"}),
    **{f"no-{layer}": _WithoutConvolution(f"without {layer}", _MIDDLE, 2.0, fields={"left_out": (layer,)})
       for layer in CONVOLUTIONS[2:]},
}


def ablated(recipe: Recipe, name: str) -> Recipe:
    """Return `recipe` with the change called `name`. RecipeError where there is none of that name."""
    if name not in ABLATIONS:
        raise RecipeError(f"no ablation named {name!r}; there are {', '.join(ABLATIONS)}")
    return replace(ABLATIONS[name].of(recipe), name=f"{recipe.name} {name}")
